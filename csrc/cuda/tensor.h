// What the CUDA kernels' host side needs of torch beside common/tensor.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"
#include "cuda/arguments.cuh"
#include "cuda/unit.cuh"

namespace diffgap {

// Makes a tensor's device the current one and launches on its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline Index index_of(const Tensor& index) { return {data_of<int64_t>(index), index.stride(0)}; }

inline Index index_or_null(const std::optional<Tensor>& index) { return index ? index_of(*index) : Index{nullptr, 0}; }

// Of a contiguous table in float64 or float32.
inline Table table_of(const Tensor& table) {
  return {table.const_data_ptr(), table.scalar_type() == ScalarType::Double, table.size(0),
          static_cast<int>(table.size(1))};
}

// Teams are counted in 32 bits (launch.cuh).
inline void check_teams(const char* name, int64_t teams) {
  STD_TORCH_CHECK(teams <= INT32_MAX, name, ": has ", teams, " rows, more than a kernel can count");
}

}  // namespace diffgap
