// diffgap::attention_backward on the CPU; diffgap/ops/attention.py has the definition, cpu/attention.h the method.
#include "cpu/attention.h"

namespace diffgap {
namespace {

// With dP^T = V dO^T and D the columns' sums of P^T * dP^T, the gradient of S / scale is dS^T = scale P^T * (dP^T - D);
// then dV = P^T dO, dK = dS^T Q, dQ = dS K.
template <typename T>
struct Gradients {
  Heads<T> q, k, v;
  float *q_weight, *k_weight;  // (chunks of groups, width), zeros; or null
};

// dS^T in place of dP^T.
template <int lanes>
struct LogitGradients {
  static DIFFGAP_HD void run(const float* p, float* dp, int keys, int width, float scale) {
    using Vector = typename Registers<lanes>::Vector;
    for (int column = 0; column < width; column += lanes) {
      const Vector total = sum_of<lanes>(keys, [&](int j) __attribute__((always_inline)) {
        const int64_t at = static_cast<int64_t>(j) * width + column;
        return *reinterpret_cast<const Vector*>(p + at) * *reinterpret_cast<const Vector*>(dp + at);
      });
      for (int j = 0; j < keys; ++j) {
        const int64_t at = static_cast<int64_t>(j) * width + column;
        Vector& gradient = *reinterpret_cast<Vector*>(dp + at);
        gradient = scale * *reinterpret_cast<const Vector*>(p + at) * (gradient - total);
      }
    }
  }
};

struct BackwardBody {
  template <typename Width, int together, typename T>
  static DIFFGAP_HD void run(const Plan& plan, const Heads<const T>& grad, const Inputs<T>& in,
                             const Gradients<T>& out, int64_t begin, int64_t end) {
    constexpr int lanes = Width::lanes;
    const Problem& problem = plan.problem;
    const int width = plan.width, block = problem.block(), keys = problem.keys;
    const int64_t key_rows = int64_t{together} * keys * width, query_rows = int64_t{kBlock} * width;
    Scratch scratch(6 * key_rows + 5 * query_rows + int64_t{2 * kBlock} * keys + width + 14 * 16);
    float *k_buffer = scratch.take(key_rows), *v_buffer = scratch.take(key_rows);
    float *k_side = scratch.take(key_rows), *v_side = scratch.take(key_rows);
    float *dk_buffer = scratch.take(key_rows), *dv_buffer = scratch.take(key_rows);
    float *q_buffer = scratch.take(query_rows), *do_buffer = scratch.take(query_rows);
    float *q_side = scratch.take(query_rows), *do_side = scratch.take(query_rows);
    float* dq_buffer = scratch.take(query_rows);
    float *p = scratch.take(int64_t{kBlock} * keys), *dp = scratch.take(int64_t{kBlock} * keys);
    float* temporary = scratch.take(width);
    const int64_t per_chunk = plan.groups_per_chunk();
    for (int64_t index = begin * per_chunk; index < std::min(plan.groups, end * per_chunk); ++index) {
      const auto group = plan.group<Width, together>(index);
      float* dq_weight = out.q_weight ? out.q_weight + index / per_chunk * width : nullptr;
      float* dk_weight = out.k_weight ? out.k_weight + index / per_chunk * width : nullptr;
      Strip k[together], v[together], q[together], dout[together];
      group.stage_all(in.k, 0, keys, plan.k_shape(), true, k_buffer, k);
      group.stage_all(in.v, 0, keys, plan.shape(), true, v_buffer, v);
      const Scalars k_left = group.left_operand(k, keys, k_side), v_left = group.left_operand(v, keys, v_side);
      Target dk[together], dv[together];
      const bool one_block = problem.queries <= block;
      for (int g = 0; g < group.pairs; ++g) {
        const BatchHead& pair = group.pair[g];
        const int64_t offset = static_cast<int64_t>(g) * keys * width;
        dk[g] = target_of(out.k, pair, plan.k_shape(), one_block, dk_buffer + offset);
        dv[g] = target_of(out.v, pair, plan.shape(), one_block, dv_buffer + offset);
      }
      for (int first = 0; first < problem.queries; first += block) {
        const int count = std::min(block, problem.queries - first), seen = problem.keys_seen(first, count);
        const int columns = static_cast<int>(round_up(count * together, lanes));
        group.stage_all(in.q, first, count, plan.q_shape(), false, q_buffer, q);
        group.stage_all(grad, first, count, plan.shape(), false, do_buffer, dout);
        const Strip q_right = group.right_operand(q, count, columns, problem.scale, q_side);
        const Strip do_right = group.right_operand(dout, count, columns, 1.0f, do_side);
        multiply<Width, together>(k_left, seen, q_right, width, columns, false, p, columns);
        group.softmax(p, first, seen, columns);
        multiply<Width, together>(v_left, seen, do_right, width, columns, false, dp, columns);
        run_apart<Width, LogitGradients<lanes>>(p, dp, seen, columns, problem.scale);
        for (int g = 0; g < group.pairs; ++g) {
          const BatchHead& pair = group.pair[g];
          const Target dq = target_of(out.q, pair, plan.q_shape(), one_block, dq_buffer);
          multiply<Width>({p + g, columns, together}, seen, dout[g], count, width, first > 0, dv[g].data, dv[g].stride);
          multiply<Width>({dp + g, columns, together}, seen, q[g], count, width, first > 0, dk[g].data, dk[g].stride);
          multiply<Width>({dp + g, together, columns}, count, k[g], seen, width, false, dq.data, dq.stride);
          // Keys after the first block's last query have no gradient yet.
          if (first == 0) dv[g].zero(seen, keys, width), dk[g].zero(seen, keys, width);
          if (dq.final) continue;
          store_gradients<Width>(dq.data, in.q.at(pair) + first * in.q.token, in.q.token, count, plan.q_shape(), nullptr,
                                 dq_weight, temporary, out.q.at(pair) + first * out.q.token, out.q.token);
        }
      }
      for (int g = 0; g < group.pairs; ++g) {
        const BatchHead& pair = group.pair[g];
        if (problem.queries == 0) dv[g].zero(0, keys, width), dk[g].zero(0, keys, width);
        if (!dk[g].final) {
          store_gradients<Width>(dk[g].data, in.k.at(pair), in.k.token, keys, plan.k_shape(), problem.mask_of(pair),
                                 dk_weight, temporary, out.k.at(pair), out.k.token);
        }
        if (!dv[g].final) {
          store_gradients<Width>(dv[g].data, in.v.at(pair), in.v.token, keys, plan.shape(), nullptr, nullptr,
                                 temporary, out.v.at(pair), out.v.token);
        }
      }
    }
  }

 private:
  // Where a gradient is summed up: `final`, in the result itself, where nothing is left to do to it.
  struct Target {
    float* data;
    int64_t stride;
    bool final;

    DIFFGAP_HD void zero(int begin, int end, int width) const {
      for (int j = begin; j < end; ++j) std::fill_n(data + j * stride, width, 0.0f);
    }
  };

  template <typename T>
  static DIFFGAP_HD Target target_of(const Heads<T>& out, const BatchHead& pair, const RowShape& shape, bool one_block,
                                     float* buffer) {
    if constexpr (std::is_same_v<T, float>) {
      if (one_block && shape.as_they_are()) return {out.at(pair), out.token, true};
    }
    return {buffer, shape.width, false};
  }
};

// The sum over chunks (chunks, width) of a weight's gradient, in their order.
Tensor weight_gradient(const Tensor& like, const std::vector<float>& chunks, int64_t width, int64_t dim) {
  const Tensor result = empty_of(like, {dim}, ScalarType::Float);
  std::vector<double> sums(dim, 0.0);
  for (size_t row = 0; row < chunks.size(); row += width) {
    for (int64_t c = 0; c < dim; ++c) sums[c] += chunks[row + c];
  }
  std::copy_n(sums.begin(), dim, mutable_data_of<float>(result));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const std::optional<Tensor>& /* output */, const std::optional<Tensor>& /* lse */,
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_weight,
    const std::optional<Tensor>& k_weight, const std::optional<Tensor>& key_mask, double scale, bool causal) {
  const Arguments arguments(q, k, v, q_weight, k_weight, key_mask, scale, causal);
  const Plan plan(arguments.problem);
  STD_TORCH_CHECK(same_shape(grad, q) && grad.scalar_type() == q.scalar_type(),
                  "grad: expected the shape and dtype of q");
  const Tensor dout = with_rows(grad);
  const Tensor dq = empty_of(q, sizes_of(q), q.scalar_type()), dk = empty_of(k, sizes_of(k), q.scalar_type());
  const Tensor dv = empty_of(v, sizes_of(v), q.scalar_type());
  const int64_t per_chunk = plan.groups_per_chunk(), chunks = (plan.groups + per_chunk - 1) / per_chunk;
  std::vector<float> dq_weight(q_weight ? chunks * plan.width : 0), dk_weight(k_weight ? chunks * plan.width : 0);
  for_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto from = heads_of<T>(dout);
    const auto in = arguments.inputs<T>();
    const Gradients<T> out{mutable_heads_of<T>(dq), mutable_heads_of<T>(dk), mutable_heads_of<T>(dv),
                           q_weight ? dq_weight.data() : nullptr, k_weight ? dk_weight.data() : nullptr};
    const int64_t grain = std::max<int64_t>(1, plan.grain() / (3 * per_chunk));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      run_lanes<ByTogether<BackwardBody>>(plan, from, in, out, begin, end);
    });
  });
  const auto weight = [&](bool present, const std::vector<float>& parts) {
    return present ? weight_gradient(q, parts, plan.width, plan.problem.dim) : empty_of(q, {0}, q.scalar_type());
  };
  return {dq, dk, dv, weight(q_weight.has_value(), dq_weight), weight(k_weight.has_value(), dk_weight)};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("attention_backward", TORCH_BOX(&diffgap::attention_backward)); }
