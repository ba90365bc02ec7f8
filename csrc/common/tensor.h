// What the kernels' host side needs of torch, all of it in the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/elements.h"

namespace diffgap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In memory without gaps. torch::stable::contiguous looks its operator up by name, which takes a microsecond even where
// there is nothing to do; torch::stable::empty_like likewise.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes(), x.scalar_type()); }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

// Elements per sample: the product of all sizes but the first.
inline int64_t elements_per_sample(const Tensor& x) {
  int64_t count = 1;
  for (int64_t i = 1; i < x.dim(); ++i) count *= x.size(i);
  return count;
}

// An int64 tensor (samples,) of any stride.
inline void check_index(const char* name, const Tensor& index, int64_t samples) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.size(0) == samples, name,
                  ": expected int64 of shape (", samples, ",)");
}

// Coefficients, a row for each of something, in float64 or float32 and in memory without gaps; checked.
inline Tensor checked_table(const Tensor& table, int64_t columns, const Tensor& like) {
  const ScalarType dtype = table.scalar_type();
  const bool wide = dtype == ScalarType::Double || dtype == ScalarType::Float;
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns && same_device(table, like) &&
                      (wide || dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "table: expected floating-point of ", columns, " columns on the device of the samples");
  return dense(wide ? table : torch::stable::to(table, std::optional<ScalarType>(ScalarType::Double)));
}

inline void check_row(const char* name, int64_t row, int64_t rows) {
  STD_TORCH_CHECK(row >= 0 && row < rows, name, ": values must lie in [0, ", rows, "), got ", row);
}

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x ? data_of<T>(*x) : nullptr;
}

// Calls `body` with a value of the element type of `dtype`.
template <typename Function>
void for_dtype(ScalarType dtype, const Function& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

}  // namespace diffgap
