// diffgap::linear_gradients on the CPU; diffgap/ops/linear.py has the definition.
//
// Both operands of dweight = grad.T @ x are summed over their rows, so a panel of either is packed by copying short
// pieces of rows: nothing is transposed. Blocks of rows go by one after another; of each, threads take panels of grad's
// columns, which are rows of the result. An element's sum has the same order whoever takes it.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/product.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

// Rows of a block, and panels of its columns that are packed together: with what layers have for columns of x, both
// operands stay in the second-level cache.
constexpr int kBlockRows = 2 * kDepthChunk;
constexpr int kPanels = 16;

struct PackPanels {
  static DIFFGAP_HD void run(const Rows<float>& x, int64_t row, int rows, float* out, int64_t begin, int64_t end) {
    pack_right(x, row + begin, static_cast<int>(end - begin), static_cast<int>(begin), rows, out);
  }
};

// Adds the part of one block of rows to the rows of the result that are panels `begin` to `end`.
struct AddPanels {
  template <typename Width>
  static DIFFGAP_HD void run(const Rows<float>& grad, int64_t row, int rows, const float* right, int columns,
                             int64_t stride, float* left, float* dweight, float* dbias, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel += kPanels) {
      const int first = static_cast<int>(panel) * kLeft;
      const int last = std::min(static_cast<int>(std::min(panel + kPanels, end)) * kLeft, grad.depth);
      pack_columns<kLeft>(grad, row, rows, first, last, 0, rows, left);
      float sums[kPanels * kLeft] = {};
      for (int k = 0; k < rows; ++k) {
        const float* __restrict from = grad.row(row + k) + first;
        for (int i = 0; i < last - first; ++i) sums[i] += from[i];
      }
      for (int i = first; i < last; ++i) dbias[i] += sums[i - first];
      for (int i = first; i < last; i += kLeft) {
        const float* packed = left + static_cast<int64_t>(i - first) * rows;
        for (int j = 0; j < columns; j += kRight) {
          multiply_tile<Width, Floats>(packed, right + static_cast<int64_t>(j) * rows, rows, row > 0,
                                       dweight + i * stride + j, stride);
        }
      }
    }
  }
};

std::tuple<Tensor, Tensor> linear_gradients(const Tensor& grad_in, const Tensor& x_in) {
  STD_TORCH_CHECK(grad_in.dim() == 2 && x_in.dim() == 2 && grad_in.size(0) == x_in.size(0) &&
                      grad_in.scalar_type() == ScalarType::Float && x_in.scalar_type() == ScalarType::Float,
                  "linear_gradients: expected two float32 matrices of equally many rows");
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const int64_t out_features = grad.size(1), in_features = x.size(1), count = x.size(0);
  const Tensor dbias = torch::stable::new_zeros(grad, {out_features});
  if (count == 0 || out_features == 0) {
    return {torch::stable::new_zeros(grad, {out_features, in_features}), dbias};
  }
  const Rows<float> g{data_of<float>(grad), count, static_cast<int>(out_features)};
  const Rows<float> rows{data_of<float>(x), count, static_cast<int>(in_features)};
  // Whole tiles are written.
  const int64_t stride = round_up(in_features, kRight);
  Tensor padded = empty_of(grad, {round_up(out_features, kLeft), stride}, ScalarType::Float);
  float *dweight = mutable_data_of<float>(padded), *sums = mutable_data_of<float>(dbias);
  const Buffer<float> right(stride * kBlockRows);
  for (int64_t row = 0; row < count; row += kBlockRows) {
    const int block = static_cast<int>(std::min<int64_t>(kBlockRows, count - row));
    torch::stable::parallel_for(0, block, 1 + (1 << 16) / std::max<int64_t>(in_features, 1),
                                [&](int64_t begin, int64_t end) {
      run_vectorised<PackPanels>(rows, row, block, right.data(), begin, end);
    });
    torch::stable::parallel_for(0, round_up(out_features, kLeft) / kLeft, 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> left(std::min<int64_t>(kPanels, end - begin) * kLeft * block);
      run_lanes<AddPanels>(g, row, block, right.data(), static_cast<int>(in_features), stride, left.data(), dweight,
                           sums, begin, end);
    });
  }
  Tensor rows_left = torch::stable::narrow(padded, 0, 0, out_features);
  return {dense(torch::stable::narrow(rows_left, 1, 0, in_features)), dbias};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("linear_gradients", TORCH_BOX(&diffgap::linear_gradients)); }
