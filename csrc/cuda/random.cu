// diffgap::normal on a GPU; diffgap/ops/random.py has the definition.
#include "cuda/random.cuh"

#include "cuda/tensor.h"

namespace diffgap {
namespace {

Tensor normal(const Tensor& seed, int64_t count, const std::optional<Tensor>& steps, int64_t step, int64_t stream) {
  const int64_t samples = seed.numel();
  STD_TORCH_CHECK(count >= 0, "count: must not be negative, got ", count);
  check_index("seed", seed, samples);
  if (steps) {
    check_index("steps", *steps, samples);
    STD_TORCH_CHECK(same_device(*steps, seed), "steps: expected the device of seed");
  }
  check_teams("seed", samples);
  const Tensor out = torch::stable::new_empty(seed, {samples, count}, ScalarType::Float);
  const OnDevice device(seed);
  launch_normal({samples, count, index_of(seed), index_or_null(steps), static_cast<uint32_t>(step),
                 static_cast<uint32_t>(stream), mutable_data_of<float>(out)},
                device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CUDA, m) { m.impl("normal", TORCH_BOX(&diffgap::normal)); }
