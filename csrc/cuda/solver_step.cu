// diffgap::solver_step and diffgap::solver_step_out on a GPU; diffgap/ops/solver_step.py has the definition.
#include "cuda/solver_step.cuh"

#include <cmath>

#include "common/step_arguments.h"
#include "cuda/tensor.h"

namespace diffgap {
namespace {

template <typename T>
T* mutable_data_or_null(const std::optional<Tensor>& x) {
  return x ? mutable_data_of<T>(*x) : nullptr;
}

void run_step(const StepArguments& a, const StepResults& results) {
  const int64_t count = elements_per_sample(a.sample), rows = a.x0_norm ? a.sample.size(a.sample.dim() - 1) : count;
  check_teams("sample", rows == 0 ? 0 : a.samples() * (count / rows));
  const OnDevice device(a.sample);
  for_dtype(a.sample.scalar_type(), [&](auto element) {
    using T = decltype(element);
    StepArgs<T> args{};
    args.samples = a.samples();
    args.count = count;
    args.row_length = rows;
    args.table = table_of(a.table);
    args.steps = index_or_null(a.steps);
    args.step = a.step;
    args.seeds = index_or_null(a.seed);
    args.sample = data_of<T>(a.sample);
    args.output = data_of<T>(a.output);
    args.unconditional = data_or_null<T>(a.unconditional);
    args.last = data_or_null<T>(a.last_sample);
    args.h1 = data_or_null<T>(a.h1);
    args.h2 = data_or_null<T>(a.h2);
    args.h3 = data_or_null<T>(a.h3);
    args.guidance = a.guidance();
    args.rescale = a.rescaled() ? static_cast<float>(a.guidance_rescale) : 0.0f;
    args.limit = a.x0_clamp ? static_cast<float>(*a.x0_clamp) : INFINITY;
    args.x0_norm = static_cast<float>(a.x0_norm.value_or(0.0));
    args.next = mutable_data_of<T>(results.next);
    args.x0 = mutable_data_or_null<T>(results.x0);
    args.corrected = mutable_data_or_null<T>(results.corrected);
    launch_solver_step(args, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CUDA, m) {
  using Step = diffgap::SolverStep<diffgap::run_step>;
  m.impl("solver_step", TORCH_BOX(&Step::functional));
  m.impl("solver_step_out", TORCH_BOX(&Step::out));
}
