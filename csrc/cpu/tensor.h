// What the CPU kernels need of torch beside common/tensor.h.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "cpu/tile.h"

namespace diffgap {

inline Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor zeros_of(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_zeros(like, like.sizes(), dtype);
}

// A contiguous int64 tensor (samples,), checked.
inline Tensor index_of(const char* name, const Tensor& index, int64_t samples) {
  check_index(name, index, samples);
  return dense(index);
}

// A contiguous float32 tensor (count,), checked.
inline Tensor vector_of(const char* name, const Tensor& values, int64_t count) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.size(0) == count, name,
                  ": expected float32 of shape (", count, ",)");
  return dense(values);
}

// The value of a float32 tensor of one element.
inline float scalar_of(const Tensor& value) {
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.numel() == 1, "expected a float32 of one element");
  return *data_of<float>(value);
}

// The parts' sum as a tensor of `like`'s shape, in float32.
inline Tensor sum_as_scalar(const Tensor& like, const std::vector<double>& parts) {
  const Tensor result = empty_of(like, {}, ScalarType::Float);
  double sum = 0;
  for (const double part : parts) sum += part;
  *mutable_data_of<float>(result) = static_cast<float>(sum);
  return result;
}

}  // namespace diffgap
