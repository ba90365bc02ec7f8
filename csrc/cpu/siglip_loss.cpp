// diffgap::siglip_loss and its backward on the CPU; diffgap/ops/siglip_loss.py has the definition.
#include "common/exp.h"
#include "cpu/pair_gradients.h"
#include "cpu/pairs.h"

namespace diffgap {
namespace {

// What both passes share: a pair's loss is softplus(y) of y = -z S, z = 1 for positive pairs and -1 for all others.
struct Pairwise {
  const Positives* positives;
  float scale, bias;

  // y from inner products; a sign is turned for the positive pairs, here and in the derivative.
  DIFFGAP_HD void logits(const Place& at, const float* __restrict products, float* __restrict y) const {
    for (int i = 0; i < at.rows * kColumns; ++i) y[i] = scale * products[i] + bias;
    negate_positives(at, y);
  }

  DIFFGAP_HD void negate_positives(const Place& at, float* __restrict y) const {
    positives->visit(at, [&](int i, int j) __attribute__((always_inline)) {
      y[i * kColumns + j] = -y[i * kColumns + j];
    });
  }
};

struct LossEpilogue {
  Pairwise pairwise;
  double* losses;

  DIFFGAP_HD void tile(const Place& at, float* __restrict products) const {
    alignas(64) float y[kLeft * kColumns];
    pairwise.logits(at, products, y);
    for (int i = 0; i < at.rows; ++i) {
      float* __restrict row = y + i * kColumns;
      for (int j = 0; j < kColumns; ++j) row[j] = softplus(row[j]).value;
      for (int j = at.columns; j < kColumns; ++j) row[j] = 0.0f;
      losses[at.row + i] += sum_of<double>(row);
    }
  }
};

struct GradientEpilogue {
  Pairwise pairwise;
  const float* grad_rows;
  double* losses;
  double* scale_gradient;  // per group of rows
  double* bias_gradient;   // per group of rows

  // Turns inner products into scale * G, G_ij = grad_rows_i * d loss_ij / d S_ij.
  DIFFGAP_HD void tile(const Place& at, float* __restrict products) const {
    alignas(64) float y[kLeft * kColumns], loss[kColumns];
    pairwise.logits(at, products, y);
    for (int i = 0; i < at.rows; ++i) {
      float* __restrict row = y + i * kColumns;
      const float factor = grad_rows[at.row + i];
      for (int j = 0; j < kColumns; ++j) {
        const Softplus term = softplus(row[j]);
        loss[j] = term.value;
        row[j] = factor * term.slope;
      }
      for (int j = at.columns; j < kColumns; ++j) loss[j] = 0.0f;
      losses[at.row + i] += sum_of<double>(loss);
    }
    pairwise.negate_positives(at, y);
    double by_scale = 0, by_bias = 0;
    for (int i = 0; i < at.rows; ++i) {
      float* __restrict row = products + i * kColumns;
      float* __restrict g = y + i * kColumns;
      for (int j = at.columns; j < kColumns; ++j) row[j] = g[j] = 0.0f;
      by_bias += sum_of<double>(g);
      for (int j = 0; j < kColumns; ++j) row[j] *= g[j];
      by_scale += sum_of<double>(row);
      for (int j = 0; j < kColumns; ++j) row[j] = pairwise.scale * g[j];
    }
    scale_gradient[at.row / kGroup] += by_scale;
    bias_gradient[at.row / kGroup] += by_bias;
  }
};

Tensor losses_of(const Tensor& like, const std::vector<double>& sums) {
  const Tensor losses = empty_of(like, {static_cast<int64_t>(sums.size())}, ScalarType::Float);
  std::copy(sums.begin(), sums.end(), mutable_data_of<float>(losses));
  return losses;
}

Tensor siglip_loss(const Tensor& a, const Tensor& b, const Tensor& logit_scale, const Tensor& logit_bias,
                   const std::optional<Tensor>& ids_a, const std::optional<Tensor>& ids_b,
                   std::optional<int64_t> label_offset, std::optional<int64_t> /* memory_budget */) {
  const Positives positives(ids_a, ids_b, label_offset, a.size(0), b.size(0));
  std::vector<double> losses(a.size(0), 0.0);
  const LossEpilogue epilogue{{&positives, scalar_of(logit_scale), scalar_of(logit_bias)}, losses.data()};
  for_rows(a, b, [&](const auto& x, const auto& y) { visit_pairs(x, y, epilogue, [](int64_t, int) {}); });
  return losses_of(a, losses);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_loss_backward(
    const Tensor& grad_rows, const Tensor& a, const Tensor& b, const Tensor& logit_scale, const Tensor& logit_bias,
    const std::optional<Tensor>& ids_a, const std::optional<Tensor>& ids_b, std::optional<int64_t> label_offset,
    std::optional<int64_t> /* memory_budget */) {
  const Positives positives(ids_a, ids_b, label_offset, a.size(0), b.size(0));
  const Tensor factors = vector_of("grad_rows", grad_rows, a.size(0));
  const PairGradients gradients(a, b);
  const int64_t groups = groups_of(a.size(0));
  std::vector<double> losses(a.size(0), 0.0), scale_gradient(groups, 0.0), bias_gradient(groups, 0.0);
  const GradientEpilogue epilogue{{&positives, scalar_of(logit_scale), scalar_of(logit_bias)},
                                  data_of<float>(factors),
                                  losses.data(),
                                  scale_gradient.data(),
                                  bias_gradient.data()};
  for_rows(a, b, [&](const auto& x, const auto& y) { gradients.accumulate(x, y, epilogue); });
  return {losses_of(a, losses), gradients.a, gradients.b, sum_as_scalar(logit_scale, scale_gradient),
          sum_as_scalar(logit_bias, bias_gradient)};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  m.impl("siglip_loss", TORCH_BOX(&diffgap::siglip_loss));
  m.impl("siglip_loss_backward", TORCH_BOX(&diffgap::siglip_loss_backward));
}
