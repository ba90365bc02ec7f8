// What both passes of the CPU's attention share.
//
// Logits are held transposed, S^T = K (scale Q)^T, keys by queries: the queries stand in a vector's lanes, so that the
// softmax over the keys runs down columns, without sums within a vector, and no operand of a product but Q (and, in
// the backward pass, the output's gradient) is ever transposed. Where there are fewer queries than lanes, several heads
// share a vector. All keys of a block of queries are in cache at a time, whatever their number up to some thousands,
// so the softmax needs no running maximum, and the backward pass nothing but the inputs.
#pragma once

#include <algorithm>
#include <limits>

#include "common/exp.h"
#include "cpu/attention_rows.h"

namespace diffgap {

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

  DIFFGAP_HD BatchHead pair(int64_t index) const { return {index / heads, index % heads}; }
  DIFFGAP_HD const bool* mask_of(const BatchHead& pair) const { return mask ? mask + pair.batch * keys : nullptr; }
  DIFFGAP_HD int block() const { return keys > kManyKeys ? kBlock / 2 : kBlock; }
  DIFFGAP_HD int keys_seen(int first, int count) const { return causal ? std::min(keys, first + count) : keys; }
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

// term(0) + ... + term(count - 1). Four sums side by side, which hides the latency of an addition, of no more than 16
// terms each: the rounding of a longer one, whose terms may be alike, would grow with their number.
template <int lanes, typename Term>
DIFFGAP_HD typename Registers<lanes>::Vector sum_of(int count, const Term& term) {
  using Vector = typename Registers<lanes>::Vector;
  constexpr int kSums = 4, kChunk = 16 * kSums;
  Vector total = {};
  for (int begin = 0; begin < count; begin += kChunk) {
    const int end = std::min(begin + kChunk, count);
    Vector sum[kSums] = {};
    int j = begin;
    for (; j + kSums <= end; j += kSums) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) sum[i] += term(j + i);
    }
    for (; j < end; ++j) sum[0] += term(j);
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return total;
}

// exp(S^T - column maximum) / column sum, in place.
template <int lanes>
struct SoftmaxColumns {
  using Vector = typename Registers<lanes>::Vector;

  static DIFFGAP_HD void run(float* s, int keys, int width) {
    const Vector zeros = {};
    for (int column = 0; column < width; column += lanes) {
      const auto row = [&](int j) __attribute__((always_inline)) -> Vector& {
        return *reinterpret_cast<Vector*>(s + static_cast<int64_t>(j) * width + column);
      };
      Vector largest = zeros - kInfinity;
      for (int j = 0; j < keys; ++j) largest = row(j) > largest ? row(j) : largest;
      const Vector shift = largest == -kInfinity ? zeros : largest;
      const Vector total = sum_of<lanes>(keys, [&](int j) __attribute__((always_inline)) {
        return row(j) = exp_nonpositive(row(j) - shift);
      });
      // Zero where nothing attends.
      const Vector factor = total == 0.0f ? zeros : 1.0f / total;
      for (int j = 0; j < keys; ++j) row(j) *= factor;
    }
  }
};

// factor * rows[g] of every pair g of a group, transposed to (width, columns): query i of pair g in lane
// i * together + g, zeros in the lanes beyond `count` queries.
template <typename Width, int together>
struct TransposeRows {
  static constexpr int lanes = Width::lanes;

  static DIFFGAP_HD void run(const Strip* rows, int count, int columns, int width, const float* zeros, float factor,
                             float* out) {
    using Vector = typename Registers<lanes>::Vector;
    for (int first = 0; first < columns; first += lanes) {
      const float* sources[lanes];
      for (int l = 0; l < lanes; ++l) {
        const int i = (first + l) / together, g = l % together;
        sources[l] = i < count ? rows[g].data + i * rows[g].stride : zeros;
      }
      for (int c = 0; c < width; c += lanes) {
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
  }
};

// One group of pairs whose queries share vectors.
template <typename Width, int together>
struct Group {
  static constexpr int lanes = Width::lanes;

  const Problem& problem;
  int pairs;  // at most `together`
  RowShape plain;
  const float* zeros;  // a row
  BatchHead pair[together];
  BatchHead next[together];  // of the group after this one; none if its batch index is negative

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
    run_apart<Width, TransposeRows<Width, together>>(rows, count, columns, plain.width, zeros, factor, out);
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
      const T* ahead = next[g].batch < 0 ? nullptr : x.at(next[g]) + first * x.token;
      const bool* mask = masked ? problem.mask_of(pair[g]) : nullptr;
      float* part = buffer + static_cast<int64_t>(g) * count * shape.width;
      rows[g] = stage<Width>(x.at(pair[g]) + first * x.token, ahead, x.token, count, shape, mask, part);
    }
  }

  // P^T of queries first .. from their logits.
  DIFFGAP_HD void softmax(float* s, int first, int keys, int columns) const {
    if (problem.mask) {
      for (int g = 0; g < pairs; ++g) hide_keys(problem.mask_of(pair[g]), g, keys, columns, s);
    }
    if (problem.causal) hide_future(first, keys, columns, s);
    run_apart<Width, SoftmaxColumns<lanes>>(s, keys, columns);
  }

 private:
  static DIFFGAP_HD void hide_keys(const bool* mask, int g, int keys, int columns, float* s) {
    for (int j = 0; j < keys; ++j) {
      if (mask[j]) continue;
      float* row = s + static_cast<int64_t>(j) * columns;
      for (int l = g; l < columns; l += together) row[l] = -kInfinity;
    }
  }

  static DIFFGAP_HD void hide_future(int first, int keys, int columns, float* s) {
    for (int j = first + 1; j < keys; ++j) {
      std::fill_n(s + static_cast<int64_t>(j) * columns, std::min((j - first) * together, columns), -kInfinity);
    }
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
    Group<Width, together_> group{problem, pairs, shape(), zeros.data(), {}, {}};
    for (int g = 0; g < together_; ++g) {
      const int64_t pair = first + g, next = pair + together_;
      if (g < pairs) group.pair[g] = problem.pair(pair);
      group.next[g] = next < problem.pairs ? problem.pair(next) : BatchHead{-1, 0};
    }
    return group;
  }

  // Groups that share the gradient of a weight: enough chunks for many threads, and always the same ones.
  int64_t groups_per_chunk() const { return std::clamp<int64_t>(groups / 64, 1, 8); }

  // Groups that are worth waking a thread for: 15 us, at 200 GFLOP/s and 70 ns a pair for the rest.
  int64_t grain() const {
    const double nanoseconds = 70 + 4.0 * problem.queries * problem.keys * problem.dim / 200;
    return std::max<int64_t>(1, static_cast<int64_t>(15e3 / (nanoseconds * together)));
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

// Last dimension contiguous; other strides are the kernels' to follow.
inline Tensor with_rows(const Tensor& x) {
  return x.dim() == 4 && (x.size(3) <= 1 || x.stride(3) == 1) ? x : dense(x);
}

template <typename T>
Heads<const T> heads_of(const Tensor& x) {
  return {data_of<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
Heads<T> mutable_heads_of(const Tensor& x) {
  return {mutable_data_of<T>(x), x.stride(0), x.stride(1), x.stride(2)};
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
      mask = dense(*mask_);
      problem.mask = data_of<bool>(*mask);
    }
  }

  template <typename T>
  Inputs<T> inputs() const {
    return {heads_of<T>(q), heads_of<T>(k), heads_of<T>(v)};
  }
};

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

}  // namespace diffgap
