// All pairs of two sets of rows, as tiles of their inner products: what the contrastive kernels share.
//
// The columns come in blocks whose packed form all threads share; the rows in groups, one job each. An epilogue gets
// each tile while it is in the first-level cache. No result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/product.h"
#include "cpu/tensor.h"

namespace diffgap {

constexpr int kGroup = 96;    // rows of a job
constexpr int kColumns = 96;  // columns of a tile: whole panels of either kind
static_assert(kGroup % kLeft == 0 && kColumns % kLeft == 0 && kColumns % kRight == 0);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where a tile stands among all pairs.
struct Place {
  int64_t row, column;  // of its first element
  int rows, columns;    // how many are there; the tile is kLeft x kColumns
  int offset;           // of its first column in the block of columns
};

// Columns whose packed rows take at most `bytes`, in whole tiles.
inline int block_columns(int depth, int64_t bytes, int64_t columns) {
  const int64_t fitting = bytes / (4 * std::max(depth, 1)) / kColumns * kColumns;
  return static_cast<int>(std::clamp<int64_t>(fitting, kColumns, round_up(std::max<int64_t>(columns, 1), kColumns)));
}

inline int64_t groups_of(int64_t rows) { return (rows + kGroup - 1) / kGroup; }

// Room for packed operands, whichever the machine's form of them is.
template <typename Operand>
typename Operand::Element* as_operand(void* memory) {
  return static_cast<typename Operand::Element*>(memory);
}

// Packs rows of `source` as columns of a product, one job of kColumns each.
template <typename T>
struct PackColumns {
  template <typename Width>
  static DIFFGAP_HD void run(const Rows<T>& source, int64_t first, int count, void* out, int64_t begin, int64_t end) {
    using Operand = OperandOf<Width, T>;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t offset = job * kColumns;
      const int rows = static_cast<int>(std::min<int64_t>(count - offset, kColumns));
      pack_panels<Operand, kRight>(source, first + offset, rows,
                                   as_operand<Operand>(out) + offset * steps_of<Operand>(source.depth));
    }
  }
};

// The tiles of one group of rows (in `left`, packed) and a block of columns (in `right`, packed), in an order in
// which the columns stay in the second-level cache while the rows go by.
template <typename Width, typename Operand, typename Epilogue>
DIFFGAP_HD void visit_tiles(const typename Operand::Element* left, const typename Operand::Element* right, int depth,
                            int64_t row, int rows, int64_t column, int columns, const Epilogue& epilogue) {
  constexpr int kSecondLevelBytes = 400 << 10;
  const int64_t steps = steps_of<Operand>(depth);
  const int fitting = kSecondLevelBytes / (4 * (steps > 0 ? static_cast<int>(steps) : 1)) / kColumns * kColumns;
  const int step = fitting > kColumns ? fitting : kColumns;
  alignas(64) float tile[kLeft * kColumns];
  for (int first = 0; first < columns; first += step) {
    const int last = columns - first < step ? columns : first + step;
    for (int i = 0; i < rows; i += kLeft) {
      for (int j = first; j < last; j += kColumns) {
        const Place place{row + i, column + j, rows - i < kLeft ? rows - i : kLeft,
                          last - j < kColumns ? last - j : kColumns, j};
        for (int k = 0; k < place.columns; k += kRight) {
          multiply_tile<Width, Operand>(left + i * steps, right + (j + k) * steps, depth, false, tile + k, kColumns);
        }
        epilogue.tile(place, tile);
      }
    }
  }
}

// Groups `begin` to `end` of the rows of `a` against one block of columns.
template <typename T, typename Epilogue>
struct VisitGroups {
  template <typename Width>
  static DIFFGAP_HD void run(const Rows<T>& a, void* right, int64_t column, int columns, const Epilogue& epilogue,
                             void* scratch, int64_t begin, int64_t end) {
    using Operand = OperandOf<Width, T>;
    auto* left = as_operand<Operand>(scratch);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * kGroup;
      const int rows = static_cast<int>(a.count - row < kGroup ? a.count - row : kGroup);
      pack_panels<Operand, kLeft>(a, row, rows, left);
      visit_tiles<Width, Operand>(left, as_operand<Operand>(right), a.depth, row, rows, column, columns, epilogue);
    }
  }
};

// Columns of a block in visit_pairs.
template <typename T>
int visited_columns(const Rows<T>& b) {
  return block_columns(b.depth, 3 << 20, b.count);
}

// Hands every tile of a @ b.T to `epilogue.tile(place, tile)`: blocks of columns one after another, each followed by
// `after(first column, columns)`; the groups of rows in parallel.
template <typename T, typename Epilogue, typename After>
void visit_pairs(const Rows<T>& a, const Rows<T>& b, const Epilogue& epilogue, const After& after) {
  const int step = visited_columns(b);
  const Buffer<float> right(static_cast<int64_t>(step) * b.depth);
  for (int64_t column = 0; column < b.count; column += step) {
    const int columns = static_cast<int>(std::min<int64_t>(step, b.count - column));
    torch::stable::parallel_for(0, groups_of(columns), 1, [&](int64_t begin, int64_t end) {
      run_blocked<PackColumns<T>>(b, column, columns, static_cast<void*>(right.data()), begin, end);
    });
    torch::stable::parallel_for(0, groups_of(a.count), 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> left(static_cast<int64_t>(kGroup) * a.depth);
      run_blocked<VisitGroups<T, Epilogue>>(a, static_cast<void*>(right.data()), column, columns, epilogue,
                                            static_cast<void*>(left.data()), begin, end);
    });
    after(column, columns);
  }
}

// Calls `body` with two matrices of one dtype as rows of their element type.
template <typename Function>
void for_rows(const Tensor& a, const Tensor& b, const Function& body) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "expected two matrices of one width and dtype");
  const Tensor x = dense(a), y = dense(b);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int depth = static_cast<int>(x.size(1));
    body(Rows<T>{data_of<T>(x), x.size(0), depth}, Rows<T>{data_of<T>(y), y.size(0), depth});
  });
}

// Largest and sum of one row of a tile, in lanes so that compilers vectorise them.
DIFFGAP_HD float largest_of(const float* __restrict row) {
  constexpr int kParts = 16;
  float parts[kParts];
  for (int l = 0; l < kParts; ++l) parts[l] = row[l];
  for (int j = kParts; j < kColumns; j += kParts) {
    for (int l = 0; l < kParts; ++l) parts[l] = row[j + l] > parts[l] ? row[j + l] : parts[l];
  }
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) parts[l] = parts[l + half] > parts[l] ? parts[l + half] : parts[l];
  }
  return parts[0];
}

template <typename Sum = float>
DIFFGAP_HD Sum sum_of(const float* __restrict row) {
  constexpr int kParts = 16;
  Sum parts[kParts] = {};
  for (int j = 0; j < kColumns; j += kParts) {
    for (int l = 0; l < kParts; ++l) parts[l] += row[j + l];
  }
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) parts[l] += parts[l + half];
  }
  return parts[0];
}

// Which pairs are positive: those on a diagonal, those of equal code, or none.
class Positives {
 public:
  // ids_a and ids_b: contiguous int64, or both absent; then row i pairs with column i + offset, or with none.
  Positives(const std::optional<Tensor>& ids_a, const std::optional<Tensor>& ids_b, std::optional<int64_t> offset,
            int64_t rows, int64_t columns)
      : by_code_(ids_a.has_value()), diagonal_(!by_code_ && offset.has_value()), offset_(offset.value_or(0)) {
    STD_TORCH_CHECK(ids_b.has_value() == by_code_, "expected both ids_a and ids_b, or neither");
    if (!by_code_) return;
    const Tensor own = index_of("ids_a", *ids_a, rows), other = index_of("ids_b", *ids_b, columns);
    const int64_t* a = data_of<int64_t>(own);
    const int64_t* b = data_of<int64_t>(other);
    std::vector<int64_t> known(b, b + columns);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    const auto code = [&](int64_t id) {
      const auto found = std::lower_bound(known.begin(), known.end(), id);
      return found != known.end() && *found == id ? static_cast<int32_t>(found - known.begin()) : kAbsent;
    };
    row_codes_.resize(rows);
    std::transform(a, a + rows, row_codes_.begin(), code);
    column_codes_.resize(columns + kColumns, kPadding);
    std::transform(b, b + columns, column_codes_.begin(), code);
    row_code_ = row_codes_.data();
    column_code_ = column_codes_.data();
  }
  Positives(const Positives&) = delete;

  bool any() const { return by_code_ || diagonal_; }
  bool by_code() const { return by_code_; }

  // Calls `visit(i, j)` with every positive pair of the tile.
  template <typename Visit>
  DIFFGAP_HD void visit(const Place& place, const Visit& visit) const {
    if (diagonal_) {
      for (int i = 0; i < place.rows; ++i) {
        const int64_t j = place.row + i + offset_ - place.column;
        if (j >= 0 && j < place.columns) visit(i, static_cast<int>(j));
      }
    } else if (by_code_) {
      const int32_t* __restrict columns = column_code_ + place.column;
      for (int i = 0; i < place.rows; ++i) {
        const int32_t code = row_code_[place.row + i];
        int32_t found = 0;
        for (int j = 0; j < kColumns; ++j) found |= columns[j] == code ? 1 : 0;
        if (!found) continue;
        for (int j = 0; j < place.columns; ++j) {
          if (columns[j] == code) visit(i, j);
        }
      }
    }
  }

 private:
  static constexpr int32_t kAbsent = -1, kPadding = -2;
  bool by_code_, diagonal_;
  int64_t offset_;
  std::vector<int32_t> row_codes_, column_codes_;
  const int32_t* row_code_ = nullptr;
  const int32_t* column_code_ = nullptr;
};

}  // namespace diffgap
