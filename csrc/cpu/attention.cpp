// diffgap::attention on the CPU; diffgap/ops/attention.py has the definition, cpu/attention.h the method.
#include "cpu/attention.h"

namespace diffgap {
namespace {

// Outputs of items begin .. end: each is one of `parts` parts of a group's queries.
struct ForwardBody {
  template <typename Width, int together, typename T>
  static DIFFGAP_HD void run(const Plan& plan, const Inputs<T>& in, const Heads<T>& out, int64_t parts, int64_t begin,
                             int64_t end) {
    constexpr int lanes = Width::lanes;
    const Problem& problem = plan.problem;
    const int width = plan.width, block = problem.block(), keys = problem.keys;
    const int64_t key_rows = int64_t{together} * keys * width;
    Scratch scratch(3 * key_rows + int64_t{kBlock} * (3 * width + keys) + 7 * 16);
    float *k_buffer = scratch.take(key_rows), *v_buffer = scratch.take(key_rows), *left = scratch.take(key_rows);
    float *q_buffer = scratch.take(int64_t{kBlock} * width), *right = scratch.take(int64_t{kBlock} * width);
    float *s = scratch.take(int64_t{kBlock} * keys), *rows = scratch.take(int64_t{kBlock} * width);
    const int64_t part_size = round_up((problem.queries + parts - 1) / parts, block);
    for (int64_t item = begin; item < end; ++item) {
      const int part = static_cast<int>(item % parts * part_size);
      const int last = static_cast<int>(std::min<int64_t>(problem.queries, part + part_size));
      if (part >= last) continue;
      const auto group = plan.group<Width, together>(item / parts);
      Strip k[together], v[together], q[together];
      group.stage_all(in.k, 0, keys, plan.k_shape(), true, k_buffer, k);
      group.stage_all(in.v, 0, keys, plan.shape(), true, v_buffer, v);
      const Scalars k_left = group.left_operand(k, keys, left);
      for (int first = part; first < last; first += block) {
        const int count = std::min(block, last - first), seen = problem.keys_seen(first, count);
        const int columns = static_cast<int>(round_up(count * together, lanes));
        group.stage_all(in.q, first, count, plan.q_shape(), false, q_buffer, q);
        const Strip q_right = group.right_operand(q, count, columns, problem.scale, right);
        multiply<Width, together>(k_left, seen, q_right, width, columns, false, s, columns);
        group.softmax(s, first, seen, columns);
        for (int g = 0; g < group.pairs; ++g) {
          const Scalars p{s + g, together, columns};
          T* target = out.at(group.pair[g]) + first * out.token;
          if constexpr (std::is_same_v<T, float>) {
            if (problem.dim == width) {
              multiply<Width>(p, count, v[g], seen, width, false, target, out.token);
              continue;
            }
          }
          multiply<Width>(p, count, v[g], seen, width, false, rows, width);
          for (int i = 0; i < count; ++i) {
            store_row<lanes>(rows + static_cast<int64_t>(i) * width, problem.dim, target + i * out.token);
          }
        }
      }
    }
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                                     const std::optional<Tensor>& key_mask, double scale, bool causal) {
  const Arguments arguments(q, k, v, q_weight, k_weight, key_mask, scale, causal);
  const Plan plan(arguments.problem);
  const Tensor out = empty_of(q, sizes_of(q), q.scalar_type());
  // Few heads with many queries: the queries are shared among threads too, which changes no bit.
  const int64_t blocks = (plan.problem.queries + kBlock - 1) / kBlock, threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(4 * threads / std::max<int64_t>(plan.groups, 1), 1,
                                            std::max<int64_t>(blocks, 1));
  for_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto in = arguments.inputs<T>();
    const auto to = mutable_heads_of<T>(out);
    torch::stable::parallel_for(0, plan.groups * parts, plan.grain() * parts, [&](int64_t begin, int64_t end) {
      run_lanes<ByTogether<ForwardBody>>(plan, in, to, parts, begin, end);
    });
  });
  return {out, empty_of(q, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("attention", TORCH_BOX(&diffgap::attention)); }
