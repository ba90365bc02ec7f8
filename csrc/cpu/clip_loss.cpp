// diffgap::clip_loss and its backward on the CPU; diffgap/ops/clip_loss.py has the definition.
#include <cmath>

#include "common/exp.h"
#include "cpu/pair_gradients.h"
#include "cpu/pairs.h"

namespace diffgap {
namespace {

// A running log-sum-exp is the largest logit so far and the sum of exp(logit - largest), in float64: of a nearly
// solved batch it is 1 plus something tiny, and that is what the gradient needs.

// A shift of -inf would give NaN where every logit is -inf.
DIFFGAP_HD float shift_of(float largest) { return largest == -kInfinity ? 0.0f : largest; }

// The columns' part of the statistics over one group of rows.
struct ColumnState {
  float* largest;    // (groups, step)
  double* sum;       // (groups, step)
  double* positive;  // (groups, step)
  int64_t step;
};

struct ForwardEpilogue {
  const Positives* positives;
  float scale;
  float* row_largest;
  double* row_sum;
  double* row_positive;
  ColumnState columns;
  bool one_sided;
  float* logits;  // or null
  int64_t logits_stride;

  DIFFGAP_HD void tile(const Place& at, float* __restrict s) const {
    for (int i = 0; i < at.rows; ++i) {
      float* __restrict row = s + i * kColumns;
      for (int j = 0; j < kColumns; ++j) row[j] *= scale;
      if (logits) std::copy_n(row, at.columns, logits + (at.row + i) * logits_stride + at.column);
      for (int j = at.columns; j < kColumns; ++j) row[j] = -kInfinity;
    }
    update_rows(at, s);
    if (!one_sided) update_columns(at, s);
    const int64_t column = (at.row / kGroup) * columns.step + at.offset;
    positives->visit(at, [&](int i, int j) __attribute__((always_inline)) {
      row_positive[at.row + i] += s[i * kColumns + j];
      if (!one_sided) columns.positive[column + j] += s[i * kColumns + j];
    });
  }

  DIFFGAP_HD void update_rows(const Place& at, const float* __restrict s) const {
    alignas(64) float terms[kColumns];
    for (int i = 0; i < at.rows; ++i) {
      const float* __restrict row = s + i * kColumns;
      const float before = row_largest[at.row + i], here = largest_of(row);
      const float largest = here > before ? here : before, shift = shift_of(largest);
      for (int j = 0; j < kColumns; ++j) terms[j] = exp_nonpositive(row[j] - shift);
      row_sum[at.row + i] = row_sum[at.row + i] * exp_nonpositive(before - shift) + sum_of<double>(terms);
      row_largest[at.row + i] = largest;
    }
  }

  DIFFGAP_HD void update_columns(const Place& at, const float* __restrict s) const {
    const int64_t first = (at.row / kGroup) * columns.step + at.offset;
    float* __restrict largest = columns.largest + first;
    double* __restrict sum = columns.sum + first;
    alignas(64) float shift[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      float most = largest[j];
      for (int i = 0; i < at.rows; ++i) most = s[i * kColumns + j] > most ? s[i * kColumns + j] : most;
      shift[j] = shift_of(most);
      sum[j] *= exp_nonpositive(largest[j] - shift[j]);
      largest[j] = most;
    }
    for (int i = 0; i < at.rows; ++i) {
      for (int j = 0; j < kColumns; ++j) sum[j] += exp_nonpositive(s[i * kColumns + j] - shift[j]);
    }
  }
};

// Merges what the groups of rows found for columns begin to end of a block into group 0.
struct MergeColumns {
  static DIFFGAP_HD void run(const ColumnState& state, int64_t groups, int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < end * kColumns; first += kColumns) {
      float* __restrict largest = state.largest + first;
      double* __restrict sum = state.sum + first;
      double* __restrict positive = state.positive + first;
      for (int64_t group = 1; group < groups; ++group) {
        const float* __restrict other = state.largest + group * state.step + first;
        const double* __restrict other_sum = state.sum + group * state.step + first;
        const double* __restrict other_positive = state.positive + group * state.step + first;
        for (int j = 0; j < kColumns; ++j) {
          const float most = other[j] > largest[j] ? other[j] : largest[j], shift = shift_of(most);
          sum[j] = sum[j] * exp_nonpositive(largest[j] - shift) + other_sum[j] * exp_nonpositive(other[j] - shift);
          largest[j] = most;
          positive[j] += other_positive[j];
        }
      }
    }
  }
};

// How a vector's losses follow from its statistics.
struct Finish {
  bool any;              // whether anything is positive
  const float* weights;  // 1 / number of positives, 0 without; or null: exactly one each
  float* losses;
  float* lse;  // (count, 2): largest, log of the sum

  void operator()(int64_t index, float largest, double sum, double positive) const {
    const float rest = static_cast<float>(std::log(sum));
    lse[2 * index] = largest;
    lse[2 * index + 1] = rest;
    const double count = !any ? 0 : weights ? std::round(1.0 / weights[index]) : 1;
    const bool has_positive = any && (!weights || weights[index] > 0);
    losses[index] = has_positive ? static_cast<float>((largest - positive / count) + rest) : 0.0f;
  }
};

template <typename T>
void forward(const Rows<T>& a, const Rows<T>& b, float scale, const Positives& positives, bool one_sided,
             const Finish& rows, const Finish& columns, float* logits) {
  const int64_t groups = groups_of(a.count);
  const int step = visited_columns(b);
  const Buffer<float> row_largest(a.count);
  const Buffer<double> row_sum(a.count), row_positive(a.count);
  std::fill_n(row_largest.data(), a.count, -kInfinity);
  std::fill_n(row_sum.data(), a.count, 0.0);
  std::fill_n(row_positive.data(), a.count, 0.0);
  const int64_t states = one_sided ? 0 : std::max<int64_t>(groups, 1) * step;
  const Buffer<float> largest(states);
  const Buffer<double> sum(states), positive(states);
  const ColumnState state{largest.data(), sum.data(), positive.data(), step};
  const ForwardEpilogue epilogue{&positives,          scale, row_largest.data(), row_sum.data(),
                                 row_positive.data(), state, one_sided,          logits,
                                 b.count};
  const auto reset = [&] {
    std::fill_n(largest.data(), states, -kInfinity);
    std::fill_n(sum.data(), states, 0.0);
    std::fill_n(positive.data(), states, 0.0);
  };
  reset();
  visit_pairs(a, b, epilogue, [&](int64_t first, int count) {
    if (one_sided) return;
    torch::stable::parallel_for(0, groups_of(count), 1, [&](int64_t begin, int64_t end) {
      run_vectorised<MergeColumns>(state, groups, begin, end);
    });
    for (int j = 0; j < count; ++j) columns(first + j, state.largest[j], state.sum[j], state.positive[j]);
    reset();
  });
  for (int64_t i = 0; i < a.count; ++i) {
    rows(i, row_largest.data()[i], row_sum.data()[i], row_positive.data()[i]);
  }
}

std::optional<Tensor> weights_of(const char* name, const std::optional<Tensor>& weights, int64_t count) {
  if (!weights) return std::nullopt;
  return vector_of(name, *weights, count);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_loss(
    const Tensor& a, const Tensor& b, const Tensor& logit_scale, const std::optional<Tensor>& ids_a,
    const std::optional<Tensor>& ids_b, const std::optional<Tensor>& weights_a,
    const std::optional<Tensor>& weights_b, bool one_sided, std::optional<int64_t> label_offset,
    std::optional<int64_t> /* memory_budget */, bool keep_logits) {
  const int64_t n = a.size(0), m = b.size(0), columns = one_sided ? 0 : m;
  const Tensor losses_a = empty_of(a, {n}, ScalarType::Float), lse_a = empty_of(a, {n, 2}, ScalarType::Float);
  const Tensor losses_b = empty_of(a, {columns}, ScalarType::Float);
  const Tensor lse_b = empty_of(a, {columns, 2}, ScalarType::Float);
  const Tensor logits = keep_logits ? empty_of(a, {n, m}, ScalarType::Float) : empty_of(a, {0, 0}, ScalarType::Float);
  const Positives positives(ids_a, ids_b, label_offset, n, m);
  const std::optional<Tensor> own = weights_of("weights_a", weights_a, n);
  const std::optional<Tensor> other = weights_of("weights_b", weights_b, m);
  const Finish rows{positives.any(), own ? data_of<float>(*own) : nullptr, mutable_data_of<float>(losses_a),
                    mutable_data_of<float>(lse_a)};
  const Finish finish_columns{positives.any(), other ? data_of<float>(*other) : nullptr,
                              mutable_data_of<float>(losses_b), mutable_data_of<float>(lse_b)};
  for_rows(a, b, [&](const auto& x, const auto& y) {
    forward(x, y, scalar_of(logit_scale), positives, one_sided, rows, finish_columns,
            keep_logits ? mutable_data_of<float>(logits) : nullptr);
  });
  return {losses_a, losses_b, lse_a, lse_b, logits};
}

struct BackwardEpilogue {
  const Positives* positives;
  float scale;
  float to_logit;    // from what the tiles hold: inner products, or kept logits
  float to_product;  // likewise
  const float* rows_lse;
  const float* columns_lse;  // null if one-sided, and then the columns' factors are too
  const float* softmax_rows;
  const float* softmax_columns;
  const float* target_rows;
  const float* target_columns;
  double* scale_gradient;  // per group of rows

  // Turns inner products, or logits, into scale * G; what is beyond at.rows and at.columns does not matter.
  DIFFGAP_HD void tile(const Place& at, float* __restrict values) const {
    alignas(64) float logits[kLeft * kColumns], g[kLeft * kColumns];
    // Rounded, as the forward pass summed them: subtracted from the largest in one fused operation, the exact products
    // would give softmaxes that do not sum to 1, by as much as the rounding of a logit.
    for (int i = 0; i < at.rows * kColumns; ++i) logits[i] = to_logit * values[i];
    for (int i = 0; i < at.rows; ++i) {
      const float* __restrict row = logits + i * kColumns;
      float* __restrict out = g + i * kColumns;
      const float largest = rows_lse[2 * (at.row + i)], rest = rows_lse[2 * (at.row + i) + 1];
      const float factor = softmax_rows[at.row + i];
      for (int j = 0; j < kColumns; ++j) out[j] = factor * softmax(row[j], largest, rest);
    }
    if (columns_lse) add_columns(at, logits, g);
    positives->visit(at, [&](int i, int j) __attribute__((always_inline)) {
      const int64_t row = at.row + i, column = at.column + j;
      const float logit = logits[i * kColumns + j];
      float& entry = g[i * kColumns + j];
      entry = positive(logit, rows_lse + 2 * row, softmax_rows[row], target_rows[row]);
      if (!columns_lse) return;
      entry += positive(logit, columns_lse + 2 * column, softmax_columns[column], target_columns[column]);
    });
    double gradient = 0;
    for (int i = 0; i < at.rows; ++i) {
      float* __restrict row = values + i * kColumns;
      float* __restrict out = g + i * kColumns;
      for (int j = at.columns; j < kColumns; ++j) row[j] = out[j] = 0.0f;
      for (int j = 0; j < kColumns; ++j) row[j] *= out[j];
      gradient += sum_of(row);
      for (int j = 0; j < kColumns; ++j) row[j] = scale * out[j];
    }
    scale_gradient[at.row / kGroup] += gradient * to_product;
  }

  // ln of the softmax; never above 0, whatever the logits.
  static DIFFGAP_HD float log_softmax(float logit, float largest, float rest) {
    const float x = (logit - largest) - rest;
    return x > 0.0f ? 0.0f : x;
  }

  static DIFFGAP_HD float softmax(float logit, float largest, float rest) {
    return exp_nonpositive(log_softmax(logit, largest, rest));
  }

  // factor * softmax - target. Nearly 1, the softmax cancels with the target of an only positive, and its difference
  // from 1 is known better; far below 1, as where a row has many positives, that difference would lose its digits.
  static float positive(float logit, const float* lse, float factor, float target) {
    const float x = log_softmax(logit, lse[0], lse[1]);
    return x > -0.6931472f ? factor * std::expm1(x) + (factor - target) : factor * exp_nonpositive(x) - target;
  }

  DIFFGAP_HD void add_columns(const Place& at, const float* __restrict logits, float* __restrict g) const {
    alignas(64) float largest[kColumns] = {}, rest[kColumns] = {}, factor[kColumns] = {};
    for (int j = 0; j < at.columns; ++j) {
      largest[j] = columns_lse[2 * (at.column + j)];
      rest[j] = columns_lse[2 * (at.column + j) + 1];
      factor[j] = softmax_columns[at.column + j];
    }
    for (int i = 0; i < at.rows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        g[i * kColumns + j] += factor[j] * softmax(logits[i * kColumns + j], largest[j], rest[j]);
      }
    }
  }
};

// A contiguous float32 tensor (rows, columns), checked.
Tensor matrix_of(const char* name, const Tensor& values, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 2 && values.size(0) == rows &&
                      values.size(1) == columns,
                  name, ": expected float32 of shape (", rows, ", ", columns, ")");
  return dense(values);
}

std::tuple<Tensor, Tensor, Tensor> clip_loss_backward(
    const Tensor& a, const Tensor& b, const Tensor& logit_scale, const std::optional<Tensor>& ids_a,
    const std::optional<Tensor>& ids_b, const Tensor& rows_lse, const Tensor& columns_lse,
    const Tensor& softmax_rows, const Tensor& softmax_columns, const Tensor& target_rows,
    const Tensor& target_columns, const Tensor& logits, std::optional<int64_t> label_offset,
    std::optional<int64_t> /* memory_budget */) {
  const int64_t n = a.size(0), m = b.size(0), columns = columns_lse.size(0);
  STD_TORCH_CHECK(columns == m || columns == 0, "columns_lse: expected ", m, " or no entries, got ", columns);
  const Tensor lse_a = matrix_of("rows_lse", rows_lse, n, 2), lse_b = matrix_of("columns_lse", columns_lse, columns, 2);
  const Tensor soft_a = vector_of("softmax_rows", softmax_rows, n);
  const Tensor soft_b = vector_of("softmax_columns", softmax_columns, columns);
  const Tensor target_a = vector_of("target_rows", target_rows, n);
  const Tensor target_b = vector_of("target_columns", target_columns, columns);
  const Positives positives(ids_a, ids_b, label_offset, n, m);
  const PairGradients gradients(a, b);
  std::vector<double> scale_gradient(groups_of(n), 0.0);
  const float scale = scalar_of(logit_scale);
  // Logits do not tell the inner products where the scale is 0.
  const bool kept = logits.numel() > 0 && scale != 0.0f;
  const Tensor s = kept ? matrix_of("logits", logits, n, m) : logits;
  const BackwardEpilogue epilogue{&positives,
                                  scale,
                                  kept ? 1.0f : scale,
                                  kept ? 1.0f / scale : 1.0f,
                                  data_of<float>(lse_a),
                                  columns ? data_of<float>(lse_b) : nullptr,
                                  data_of<float>(soft_a),
                                  data_of<float>(soft_b),
                                  data_of<float>(target_a),
                                  data_of<float>(target_b),
                                  scale_gradient.data()};
  const float* stored = kept ? data_of<float>(s) : nullptr;
  for_rows(a, b, [&](const auto& x, const auto& y) { gradients.accumulate(x, y, epilogue, stored); });
  return {gradients.a, gradients.b, sum_as_scalar(logit_scale, scale_gradient)};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  m.impl("clip_loss", TORCH_BOX(&diffgap::clip_loss));
  m.impl("clip_loss_backward", TORCH_BOX(&diffgap::clip_loss_backward));
}
