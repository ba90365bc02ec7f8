// Gradients of a loss over all pairs: grad_a = G b and grad_b = G^T a, where an epilogue turns a tile of inner
// products into one of G. Blocks of G that fit in the caches are multiplied right away, so each inner product is
// computed once and no matrix of all pairs exists.
#pragma once

#include "cpu/pairs.h"

namespace diffgap {

// One block of pairs, rows row .. row + rows and columns column .. column + columns, and its packed operands.
template <typename T>
struct PairBlock {
  Rows<T> a, b;
  int64_t row, column;
  int rows, columns;
  void* left;           // rows of a as left panels, depth D
  void* columns_of_b;   // rows of b as columns, depth D
  float* rows_of_b;     // rows of b as a right operand of depth `columns`
  float* rows_of_a;     // rows of a as a right operand of depth `rows`
  float* g;             // G as left panels of its rows, depth `columns`
  float* g_transposed;  // G as left panels of its columns, depth `rows`
  float* grad_a;
  float* grad_b;

  DIFFGAP_HD int group_rows(int64_t group) const {
    return static_cast<int>(rows - group * kGroup < kGroup ? rows - group * kGroup : kGroup);
  }
};

template <typename T>
struct PackBlockColumns {
  template <typename Width>
  static DIFFGAP_HD void run(const PairBlock<T>& block, bool products, int64_t begin, int64_t end) {
    if (products) PackColumns<T>::template run<Width>(block.b, block.column, block.columns, block.columns_of_b, begin, end);
    for (int64_t job = begin; job < end; ++job) {
      const int offset = static_cast<int>(job) * kColumns;
      const int count = block.columns - offset < kColumns ? block.columns - offset : kColumns;
      pack_right(block.b, block.column + offset, count, offset, block.columns, block.rows_of_b);
    }
  }
};

// Writes each tile of G in both of its packed forms.
template <typename T, typename Epilogue>
struct StoreTile {
  const PairBlock<T>& block;
  const Epilogue& epilogue;

  DIFFGAP_HD void tile(const Place& at, float* __restrict s) const {
    epilogue.tile(at, s);
    const int row = static_cast<int>(at.row - block.row);
    float* __restrict g = block.g + int64_t{row} * block.columns + int64_t{at.offset} * kLeft;
    for (int j = 0; j < at.columns; ++j) {
      for (int i = 0; i < kLeft; ++i) g[j * kLeft + i] = s[i * kColumns + j];
    }
    for (int j = 0; j < at.columns; j += kLeft) {
      float* __restrict panel = block.g_transposed + int64_t{at.offset + j} * block.rows + int64_t{row} * kLeft;
      for (int i = 0; i < at.rows; ++i) {
        for (int k = 0; k < kLeft; ++k) panel[i * kLeft + k] = s[i * kColumns + j + k];
      }
    }
  }
};

// G of groups begin to end of the block's rows.
template <typename T, typename Epilogue>
struct ComputeWeights {
  template <typename Width>
  static DIFFGAP_HD void run(const PairBlock<T>& block, const Epilogue& epilogue, const float* stored,
                             int64_t begin, int64_t end) {
    const StoreTile<T, Epilogue> store{block, epilogue};
    for (int64_t group = begin; group < end; ++group) {
      const int offset = static_cast<int>(group) * kGroup, rows = block.group_rows(group);
      const int64_t row = block.row + offset;
      pack_right(block.a, row, rows, offset, block.rows, block.rows_of_a);
      if (stored) {
        read_tiles(block, stored, row, rows, store);
        continue;
      }
      using Operand = OperandOf<Width, T>;
      auto* left = as_operand<Operand>(block.left) + int64_t{offset} * steps_of<Operand>(block.a.depth);
      pack_panels<Operand, kLeft>(block.a, row, rows, left);
      visit_tiles<Width, Operand>(left, as_operand<Operand>(block.columns_of_b), block.a.depth, row, rows,
                                  block.column, block.columns, store);
    }
  }

  static DIFFGAP_HD void read_tiles(const PairBlock<T>& block, const float* stored, int64_t row, int rows,
                                    const StoreTile<T, Epilogue>& store) {
    alignas(64) float tile[kLeft * kColumns];
    for (int i = 0; i < rows; i += kLeft) {
      for (int j = 0; j < block.columns; j += kColumns) {
        const Place place{row + i, block.column + j, rows - i < kLeft ? rows - i : kLeft,
                          block.columns - j < kColumns ? block.columns - j : kColumns, j};
        for (int k = 0; k < place.rows; ++k) {
          const float* source = stored + (place.row + k) * block.b.count + place.column;
          for (int l = 0; l < kColumns; ++l) tile[k * kColumns + l] = l < place.columns ? source[l] : 0.0f;
        }
        store.tile(place, tile);
      }
    }
  }
};

// The block's share of the gradients: first the groups of its rows, then those of its columns.
template <typename T>
struct MultiplyWeights {
  template <typename Width>
  static DIFFGAP_HD void run(const PairBlock<T>& block, int64_t row_groups, int64_t begin, int64_t end) {
    const int depth = block.a.depth;
    for (int64_t job = begin; job < end; ++job) {
      const bool of_rows = job < row_groups;
      const int offset = static_cast<int>(of_rows ? job : job - row_groups) * kGroup;
      const int all = of_rows ? block.rows : block.columns, summed = of_rows ? block.columns : block.rows;
      const int count = all - offset < kGroup ? all - offset : kGroup;
      const float* left = (of_rows ? block.g : block.g_transposed) + int64_t{offset} * summed;
      const float* right = of_rows ? block.rows_of_b : block.rows_of_a;
      float* out = of_rows ? block.grad_a + (block.row + offset) * depth : block.grad_b + (block.column + offset) * depth;
      add_product<Width>(left, right, summed, count, depth, out);
    }
  }

  // out (count x depth, row-major) += left (count rows) * right, summed over `summed` terms.
  template <typename Width>
  static DIFFGAP_HD void add_product(const float* left, const float* right, int summed, int count, int depth,
                                     float* out) {
    alignas(64) float edge[kLeft * kRight];
    for (int j = 0; j < depth; j += kRight) {
      const float* panel = right + int64_t{j} * summed;
      for (int i = 0; i < count; i += kLeft) {
        const float* rows = left + int64_t{i} * summed;
        float* target = out + int64_t{i} * depth + j;
        if (count - i >= kLeft && depth - j >= kRight) {
          multiply_tile<Width, Floats>(rows, panel, summed, true, target, depth);
          continue;
        }
        multiply_tile<Width, Floats>(rows, panel, summed, false, edge, kRight);
        for (int k = 0; k < kLeft && k < count - i; ++k) {
          for (int l = 0; l < kRight && l < depth - j; ++l) target[int64_t{k} * depth + l] += edge[k * kRight + l];
        }
      }
    }
  }
};

// The gradients of two sets of rows, in float32, zero at first.
struct PairGradients {
  Tensor a, b;

  PairGradients(const Tensor& like_a, const Tensor& like_b)
      : a(zeros_of(like_a, ScalarType::Float)), b(zeros_of(like_b, ScalarType::Float)) {}

  // Adds G b and G^T a with the G that `epilogue.tile(place, tile)` makes of the inner products in a tile, or of
  // what an (N, M) matrix has `stored` for it.
  template <typename T, typename Epilogue>
  void accumulate(const Rows<T>& x, const Rows<T>& y, const Epilogue& epilogue, const float* stored = nullptr) const {
    if (x.count == 0 || y.count == 0) return;
    constexpr int64_t kBlockBytes = 3 << 19;  // of one packed operand
    const int step = block_columns(x.depth, kBlockBytes, y.count);
    // A multiple of kDepthChunk too, so that how sums are grouped does not depend on the number of threads.
    constexpr int64_t kUnit = 4 * kGroup;
    static_assert(kUnit % kDepthChunk == 0);
    const int64_t wanted = std::max<int64_t>(step, int64_t{kGroup} * torch::stable::get_num_threads());
    const int64_t height = std::min(round_up(wanted, kUnit), round_up(x.count, kGroup));
    const int64_t wide = round_up(x.depth, kRight);
    const Buffer<float> left(stored ? 0 : height * x.depth), columns_of_b(stored ? 0 : step * wide);
    const Buffer<float> rows_of_b(step * wide), rows_of_a(height * wide), g(height * step), g_transposed(height * step);
    for (int64_t column = 0; column < y.count; column += step) {
      const int columns = static_cast<int>(std::min<int64_t>(step, y.count - column));
      PairBlock<T> block{x,           y,        0,
                         column,      0,        columns,
                         left.data(), columns_of_b.data(), rows_of_b.data(),
                         rows_of_a.data(), g.data(), g_transposed.data(),
                         mutable_data_of<float>(a), mutable_data_of<float>(b)};
      torch::stable::parallel_for(0, groups_of(columns), 1, [&](int64_t begin, int64_t end) {
        run_blocked<PackBlockColumns<T>>(block, !stored, begin, end);
      });
      for (int64_t row = 0; row < x.count; row += height) {
        block.row = row;
        block.rows = static_cast<int>(std::min<int64_t>(height, x.count - row));
        const int64_t row_groups = groups_of(block.rows);
        torch::stable::parallel_for(0, row_groups, 1, [&](int64_t begin, int64_t end) {
          run_blocked<ComputeWeights<T, Epilogue>>(block, epilogue, stored, begin, end);
        });
        torch::stable::parallel_for(0, row_groups + groups_of(columns), 1, [&](int64_t begin, int64_t end) {
          run_blocked<MultiplyWeights<T>>(block, row_groups, begin, end);
        });
      }
    }
  }
};

}  // namespace diffgap
