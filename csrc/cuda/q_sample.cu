// diffgap::q_sample and its backward on a GPU; diffgap/ops/q_sample.py has the definition.
#include "cuda/q_sample.cuh"

#include <tuple>

#include "cuda/tensor.h"

namespace diffgap {
namespace {

// Checked; `table` must be so already.
NoisingArgs noising_args(const Tensor& x, const Tensor& t, const Tensor& table, int64_t target) {
  const int64_t samples = x.size(0);
  STD_TORCH_CHECK(target >= 0 && target < kTargets, "target: unknown index ", target);
  check_index("t", t, samples);
  STD_TORCH_CHECK(same_device(t, x), "t: expected the device of the samples");
  check_teams("x0", samples);
  return {samples, elements_per_sample(x), index_of(t), table_of(table), target};
}

std::tuple<Tensor, Tensor, Tensor> q_sample(const Tensor& x0, const Tensor& t, const Tensor& table, const Tensor& seed,
                                            int64_t target, bool return_noise) {
  STD_TORCH_CHECK(x0.dim() >= 1, "x0: expected shape (B, ...), got a scalar");
  const Tensor rows = checked_table(table, 2, x0);
  const NoisingArgs noising = noising_args(x0, t, rows, target);
  check_index("seed", seed, noising.samples);
  STD_TORCH_CHECK(same_device(seed, x0), "seed: expected the device of x0");
  const Tensor clean = dense(x0), x_t = new_like(clean), wanted = new_like(clean);
  const Tensor noise = return_noise ? new_like(clean) : torch::stable::new_empty(clean, {0});
  const OnDevice device(x0);
  for_dtype(clean.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_q_sample<T>({noising, index_of(seed), data_of<T>(clean), mutable_data_of<T>(x_t), mutable_data_of<T>(wanted),
                        return_noise ? mutable_data_of<T>(noise) : nullptr},
                       device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {x_t, wanted, noise};
}

Tensor q_sample_backward(const Tensor& grad_x_t, const Tensor& grad_target, const Tensor& t, const Tensor& table,
                         int64_t target) {
  STD_TORCH_CHECK(grad_x_t.dim() >= 1, "grad_x_t: expected shape (B, ...), got a scalar");
  STD_TORCH_CHECK(same_shape(grad_target, grad_x_t) && grad_target.scalar_type() == grad_x_t.scalar_type() &&
                      same_device(grad_target, grad_x_t),
                  "grad_target: expected the shape, dtype and device of grad_x_t");
  const Tensor rows = checked_table(table, 2, grad_x_t);
  const NoisingArgs noising = noising_args(grad_x_t, t, rows, target);
  const Tensor from_x_t = dense(grad_x_t), from_target = dense(grad_target), grad_x0 = new_like(from_x_t);
  const OnDevice device(grad_x_t);
  for_dtype(grad_x_t.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_q_sample_backward<T>({noising, data_of<T>(from_x_t), data_of<T>(from_target), mutable_data_of<T>(grad_x0)},
                                device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_x0;
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CUDA, m) {
  m.impl("q_sample", TORCH_BOX(&diffgap::q_sample));
  m.impl("q_sample_backward", TORCH_BOX(&diffgap::q_sample_backward));
}
