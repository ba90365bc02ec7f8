// diffgap::attention and its backward on the CPU; diffgap/ops/attention.py has the definition.
//
// Logits are held transposed, S^T = K (scale Q)^T, keys by queries: the queries stand in a vector's lanes, so that the
// softmax over the keys runs down columns, without sums within a vector, and no operand of a product but Q (and, in
// the backward pass, the output's gradient) is ever transposed. Where there are fewer queries than lanes, several heads
// share a vector. All keys of a block of queries are in cache at a time, whatever their number up to some thousands,
// so the softmax needs no running maximum, and the backward pass nothing but the inputs.
#include <algorithm>
#include <limits>

#include "common/exp.h"
#include "cpu/attention_rows.h"

namespace diffgap {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Queries of a block at most: lanes of one row of S^T.
constexpr int kBlock = 64;
// With more keys than this, half as many, for S^T and its gradient to stay in the second-level cache.
constexpr int kManyKeys = 2048;

struct Problem {
  int64_t pairs;
  int queries, keys, dim;
  float scale;
  bool causal;
  const bool* mask;  // (batch, keys), or null
  int64_t heads;
  const float *q_weight, *k_weight;  // (dim,), or null

  DIFFGAP_HD const bool* mask_of(int64_t pair) const { return mask ? mask + pair / heads * keys : nullptr; }
  int block() const { return keys > kManyKeys ? kBlock / 2 : kBlock; }
};

// Scratch memory of one thread, handed out in parts.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(floats), next_(memory_.data()) {}
  float* take(int64_t floats) {
    float* part = next_;
    next_ += round_up(floats, 16);
    return part;
  }

 private:
  Buffer<float> memory_;
  float* next_;
};

// exp(S^T - column maximum) / column sum, in place.
template <int lanes>
DIFFGAP_HD void softmax_columns(float* s, int keys, int width) {
  using Vector = typename Registers<lanes>::Vector;
  // A long sum is one of sums.
  constexpr int kChunk = 256;
  for (int column = 0; column < width; column += lanes) {
    float* first = s + column;
    Vector largest = Vector{} - kInfinity;
    for (int j = 0; j < keys; ++j) {
      const Vector logit = *reinterpret_cast<const Vector*>(first + static_cast<int64_t>(j) * width);
      largest = logit > largest ? logit : largest;
    }
    alignas(64) float shift[lanes], total[lanes] = {};
    for (int l = 0; l < lanes; ++l) shift[l] = largest[l] == -kInfinity ? 0.0f : largest[l];
    for (int begin = 0; begin < keys; begin += kChunk) {
      const int end = begin + kChunk < keys ? begin + kChunk : keys;
      alignas(64) float sum[lanes] = {};
      for (int j = begin; j < end; ++j) {
        float* __restrict row = first + static_cast<int64_t>(j) * width;
        for (int l = 0; l < lanes; ++l) {
          row[l] = exp_nonpositive(row[l] - shift[l]);
          sum[l] += row[l];
        }
      }
      for (int l = 0; l < lanes; ++l) total[l] += sum[l];
    }
    // Zero where nothing attends.
    for (int l = 0; l < lanes; ++l) total[l] = total[l] == 0.0f ? 0.0f : 1.0f / total[l];
    for (int j = 0; j < keys; ++j) {
      float* __restrict row = first + static_cast<int64_t>(j) * width;
      for (int l = 0; l < lanes; ++l) row[l] *= total[l];
    }
  }
}

// One group of pairs whose queries share vectors.
template <typename Width, int together>
struct Group {
  static constexpr int lanes = Width::lanes;

  const Problem& problem;
  int64_t first_pair;
  int pairs;  // at most `together`
  RowShape plain;
  const float* zeros;  // a row

  // Rows of all pairs for a product's left operand.
  DIFFGAP_HD Scalars left_operand(const Strip* rows, int count, float* buffer) const {
    if constexpr (together == 1) {
      return {rows[0].data, rows[0].stride, 1};
    } else {
      for (int j = 0; j < count; ++j) {
        const float* sources[together];
        for (int g = 0; g < together; ++g) sources[g] = rows[g].data + j * rows[g].stride;
        interleave<lanes, together>(sources, plain.width, buffer + static_cast<int64_t>(j) * plain.width * together);
      }
      return {buffer, static_cast<int64_t>(plain.width) * together, together};
    }
  }

  // factor * rows of all pairs, transposed: (width, lanes of all queries), for a product's right operand.
  DIFFGAP_HD Strip right_operand(const Strip* rows, int count, int columns, float factor, float* out) const {
    using Vector = typename Registers<lanes>::Vector;
    for (int first = 0; first < columns; first += lanes) {
      const float* sources[lanes];
      for (int l = 0; l < lanes; ++l) {
        const int i = (first + l) / together, g = l % together;
        sources[l] = i < count ? rows[g].data + i * rows[g].stride : zeros;
      }
      for (int c = 0; c < plain.width; c += lanes) {
        Vector square[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) square[l] = *reinterpret_cast<const Vector*>(sources[l] + c);
        transpose<lanes>(square);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
          float* row = out + static_cast<int64_t>(c + slot_of<lanes, together>(l)) * columns + first;
          *reinterpret_cast<Vector*>(row) = factor * square[l];
        }
      }
    }
    return {out, columns};
  }

  // Pairs that are not there have rows of zeros.
  template <typename T>
  DIFFGAP_HD void stage_all(const Heads<const T>& x, int64_t first, int count, const RowShape& shape, bool masked,
                            float* buffer, Strip* rows) const {
    for (int g = 0; g < together; ++g) {
      if (g >= pairs) {
        rows[g] = {zeros, 0};
        continue;
      }
      const int64_t pair = first_pair + g;
      const T* next = pair + together < problem.pairs ? x.at(pair + together) + first * x.token : nullptr;
      const bool* mask = masked ? problem.mask_of(pair) : nullptr;
      float* part = buffer + static_cast<int64_t>(g) * count * shape.width;
      rows[g] = stage<lanes>(x.at(pair) + first * x.token, next, x.token, count, shape, mask, part);
    }
  }

  // P^T of queries first .. from their logits.
  DIFFGAP_HD void softmax(float* s, int first, int keys, int columns) const {
    if (problem.mask) {
      for (int g = 0; g < pairs; ++g) {
        const bool* mask = problem.mask_of(first_pair + g);
        for (int j = 0; j < keys; ++j) {
          if (mask[j]) continue;
          float* row = s + static_cast<int64_t>(j) * columns;
          for (int l = g; l < columns; l += together) row[l] = -kInfinity;
        }
      }
    }
    if (problem.causal) {
      for (int j = first + 1; j < keys; ++j) {
        float* row = s + static_cast<int64_t>(j) * columns;
        const int hidden = std::min((j - first) * together, columns);
        for (int l = 0; l < hidden; ++l) row[l] = -kInfinity;
      }
    }
    softmax_columns<lanes>(s, keys, columns);
  }

  DIFFGAP_HD int keys_seen(int first, int count) const {
    return problem.causal ? std::min(problem.keys, first + count) : problem.keys;
  }
};

// What both passes share: the problem, and how it is cut into groups of pairs whose queries share vectors.
struct Plan {
  Problem problem;
  int width;     // of a row with padding
  int together;  // pairs of a group
  int64_t groups;
  std::vector<float> q_weight, k_weight, zeros;  // padded

  explicit Plan(const Problem& problem_) : problem(problem_) {
    const int lanes = vector_lanes();
    width = static_cast<int>(round_up(problem.dim, lanes));
    together = lanes == 16 && problem.queries <= 4 ? 4 : lanes >= 8 && problem.queries <= lanes / 2 ? 2 : 1;
    groups = (problem.pairs + together - 1) / together;
    zeros.assign(width, 0.0f);
    for (auto [weight, copy] : {std::pair{problem.q_weight, &q_weight}, std::pair{problem.k_weight, &k_weight}}) {
      if (!weight) continue;
      copy->assign(width, 0.0f);
      std::copy_n(weight, problem.dim, copy->begin());
    }
  }

  DIFFGAP_HD RowShape shape() const { return {problem.dim, width, nullptr}; }
  DIFFGAP_HD RowShape q_shape() const { return {problem.dim, width, problem.q_weight ? q_weight.data() : nullptr}; }
  DIFFGAP_HD RowShape k_shape() const { return {problem.dim, width, problem.k_weight ? k_weight.data() : nullptr}; }

  template <typename Width, int together_>
  DIFFGAP_HD Group<Width, together_> group(int64_t index) const {
    const int64_t first = index * together_;
    const int pairs = static_cast<int>(std::min<int64_t>(together_, problem.pairs - first));
    return {problem, first, pairs, shape(), zeros.data()};
  }

  // Groups that share the gradient of a weight: enough chunks for many threads, and always the same ones.
  int64_t groups_per_chunk() const { return std::clamp<int64_t>(groups / 64, 1, 8); }

  // Groups that are worth waking a thread for.
  int64_t grain() const {
    const double flops = 4.0 * together * problem.queries * problem.keys * problem.dim + 1;
    return std::max<int64_t>(1, static_cast<int64_t>(5e6 / flops));
  }
};

// Runs a body compiled for the plan's number of pairs that share vectors.
template <typename Body>
struct ByTogether {
  template <typename Width, typename... Args>
  static DIFFGAP_HD void run(const Plan& plan, const Args&... args) {
    if constexpr (Width::lanes == 16) {
      if (plan.together == 4) return Body::template run<Width, 4>(plan, args...);
    }
    if constexpr (Width::lanes >= 8) {
      if (plan.together == 2) return Body::template run<Width, 2>(plan, args...);
    }
    Body::template run<Width, 1>(plan, args...);
  }
};

template <typename T>
struct Inputs {
  Heads<const T> q, k, v;
};

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
        const int count = std::min(block, last - first), seen = group.keys_seen(first, count);
        const int columns = static_cast<int>(round_up(count * together, lanes));
        group.stage_all(in.q, first, count, plan.q_shape(), false, q_buffer, q);
        const Strip q_right = group.right_operand(q, count, columns, problem.scale, right);
        multiply<Width, together>(k_left, seen, q_right, width, columns, false, s, columns);
        group.softmax(s, first, seen, columns);
        for (int g = 0; g < group.pairs; ++g) {
          const Scalars p{s + g, together, columns};
          T* target = out.at(group.first_pair + g) + first * out.token;
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

// With dP^T = V dO^T and D the columns' sums of P^T * dP^T, the logits' gradient is dS^T = P^T * (dP^T - D); then
// dV = P^T dO, dK = dS^T (scale Q), dQ = scale * dS K.
template <typename T>
struct Gradients {
  Heads<T> q, k, v;
  float *q_weight, *k_weight;  // (chunks of groups, width), zeros; or null
};

// dS^T times scale, in place of dP^T.
template <int lanes>
DIFFGAP_HD void logit_gradients(const float* p, float* dp, int keys, int width, float scale) {
  for (int column = 0; column < width; column += lanes) {
    alignas(64) float total[lanes] = {};
    for (int j = 0; j < keys; ++j) {
      const int64_t at = static_cast<int64_t>(j) * width + column;
      for (int l = 0; l < lanes; ++l) total[l] += p[at + l] * dp[at + l];
    }
    for (int j = 0; j < keys; ++j) {
      const int64_t at = static_cast<int64_t>(j) * width + column;
      for (int l = 0; l < lanes; ++l) dp[at + l] = scale * p[at + l] * (dp[at + l] - total[l]);
    }
  }
}

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
        const int64_t pair = group.first_pair + g, offset = static_cast<int64_t>(g) * keys * width;
        dk[g] = target_of(out.k, pair, plan.k_shape(), one_block, dk_buffer + offset);
        dv[g] = target_of(out.v, pair, plan.shape(), one_block, dv_buffer + offset);
      }
      for (int first = 0; first < problem.queries; first += block) {
        const int count = std::min(block, problem.queries - first), seen = group.keys_seen(first, count);
        const int columns = static_cast<int>(round_up(count * together, lanes));
        group.stage_all(in.q, first, count, plan.q_shape(), false, q_buffer, q);
        group.stage_all(grad, first, count, plan.shape(), false, do_buffer, dout);
        const Strip q_right = group.right_operand(q, count, columns, problem.scale, q_side);
        const Strip do_right = group.right_operand(dout, count, columns, 1.0f, do_side);
        multiply<Width, together>(k_left, seen, q_right, width, columns, false, p, columns);
        group.softmax(p, first, seen, columns);
        multiply<Width, together>(v_left, seen, do_right, width, columns, false, dp, columns);
        logit_gradients<lanes>(p, dp, seen, columns, problem.scale);
        for (int g = 0; g < group.pairs; ++g) {
          const int64_t pair = group.first_pair + g;
          const Target dq = target_of(out.q, pair, plan.q_shape(), one_block, dq_buffer);
          multiply<Width>({p + g, columns, together}, seen, dout[g], count, width, first > 0, dv[g].data, dv[g].stride);
          multiply<Width>({dp + g, columns, together}, seen, q[g], count, width, first > 0, dk[g].data, dk[g].stride);
          multiply<Width>({dp + g, together, columns}, count, k[g], seen, width, false, dq.data, dq.stride);
          // Keys after the first block's last query have no gradient yet.
          if (first == 0) dv[g].zero(seen, keys, width), dk[g].zero(seen, keys, width);
          if (dq.final) continue;
          store_gradients<lanes>(dq.data, in.q.at(pair) + first * in.q.token, in.q.token, count, plan.q_shape(), nullptr,
                                 dq_weight, temporary, out.q.at(pair) + first * out.q.token, out.q.token);
        }
      }
      for (int g = 0; g < group.pairs; ++g) {
        const int64_t pair = group.first_pair + g;
        if (problem.queries == 0) dv[g].zero(0, keys, width), dk[g].zero(0, keys, width);
        if (!dk[g].final) {
          store_gradients<lanes>(dk[g].data, in.k.at(pair), in.k.token, keys, plan.k_shape(), problem.mask_of(pair),
                                 dk_weight, temporary, out.k.at(pair), out.k.token);
        }
        if (!dv[g].final) {
          store_gradients<lanes>(dv[g].data, in.v.at(pair), in.v.token, keys, plan.shape(), nullptr, nullptr,
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
  static DIFFGAP_HD Target target_of(const Heads<T>& out, int64_t pair, const RowShape& shape, bool one_block,
                                     float* buffer) {
    if constexpr (std::is_same_v<T, float>) {
      if (one_block && shape.as_they_are()) return {out.at(pair), out.token, true};
    }
    return {buffer, shape.width, false};
  }
};

// Last dimension contiguous; other strides are the kernels' to follow.
Tensor with_rows(const Tensor& x) {
  return x.dim() == 4 && (x.size(3) <= 1 || x.stride(3) == 1) ? x : torch::stable::contiguous(x);
}

template <typename T>
Heads<const T> heads_of(const Tensor& x) {
  return {data_of<T>(x), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
}

template <typename T>
Heads<T> mutable_heads_of(const Tensor& x) {
  return {mutable_data_of<T>(x), x.stride(0), x.stride(1), x.stride(2), x.size(2)};
}

// The checked arguments of both passes.
struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> q_weight, k_weight, mask;
  Problem problem;

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& q_weight_,
            const std::optional<Tensor>& k_weight_, const std::optional<Tensor>& mask_, double scale, bool causal)
      : q(with_rows(q_)), k(with_rows(k_)), v(with_rows(v_)) {
    const int64_t b = q.size(0), n = q.size(1), h = q.size(2), d = q.size(3), m = k.size(1);
    for (const auto& x : {k, v}) {
      STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == b && x.size(1) == m && x.size(2) == h && x.size(3) == d &&
                          x.scalar_type() == q.scalar_type(),
                      "attention: k and v must fit q");
    }
    STD_TORCH_CHECK(std::max(n, m) < std::numeric_limits<int>::max() / kBlock && d <= 1 << 16, "attention: too large");
    problem = {b * h, static_cast<int>(n), static_cast<int>(m), static_cast<int>(d), static_cast<float>(scale), causal,
               nullptr, h, nullptr, nullptr};
    if (q_weight_) q_weight = vector_of("q_weight", *q_weight_, d), problem.q_weight = data_of<float>(*q_weight);
    if (k_weight_) k_weight = vector_of("k_weight", *k_weight_, d), problem.k_weight = data_of<float>(*k_weight);
    if (mask_) {
      STD_TORCH_CHECK(mask_->scalar_type() == ScalarType::Bool && mask_->dim() == 2 && mask_->size(0) == b &&
                          mask_->size(1) == m,
                      "key_mask: expected bool of shape (", b, ", ", m, ")");
      mask = torch::stable::contiguous(*mask_);
      problem.mask = data_of<bool>(*mask);
    }
  }

  template <typename T>
  Inputs<T> inputs() const {
    return {heads_of<T>(q), heads_of<T>(k), heads_of<T>(v)};
  }
};

std::vector<int64_t> sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

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
  STD_TORCH_CHECK(grad.scalar_type() == q.scalar_type(), "grad: expected the dtype of q");
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

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  m.impl("attention", TORCH_BOX(&diffgap::attention));
  m.impl("attention_backward", TORCH_BOX(&diffgap::attention_backward));
}
