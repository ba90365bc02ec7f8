// Matrix products of small tiles in float32: the packed layouts and the micro-kernel.
//
// A product's left operand is read in panels of kLeft rows, its right operand in panels of kRight columns; within
// a panel the summed index runs slowest, so that the micro-kernel reads both in order. One tile of the result,
// kLeft x kRight, is held in registers. An element's sum depends on its two vectors alone, not on where in a tile
// they stand: equal rows give equal bits, which the ranks of ties rely on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "common/macros.h"
#include "cpu/isa.h"
#include "cpu/tile.h"

namespace diffgap {

constexpr int kLeft = 12;
constexpr int kRight = 32;
// Sums run over this many terms before they are added to the total: rounding errors grow with the length.
constexpr int kDepthChunk = 128;

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Scratch memory, aligned to cache lines, not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T, Free> data_;
};

DIFFGAP_HD float widen(float value) { return value; }

// A row-major matrix of any element type.
template <typename T>
struct Rows {
  const T* data;
  int64_t count;
  int depth;  // elements per row

  DIFFGAP_HD const T* row(int64_t index) const { return data + index * depth; }
  Rows slice(int64_t first, int64_t rows) const { return {row(first), rows, depth}; }
};

// How a product reads its operands: step by step of the summed index, an element of a panel's row at each.
struct Floats {
  static constexpr int terms = 1;  // of the sum in an element
  using Element = float;

  template <typename T>
  static DIFFGAP_HD float element(const T* source, int step, int) {
    return widen(source[step]);
  }
};

// Two neighbours of a bfloat16 row in one element, for processors that multiply such pairs: as exact as widened to
// float32, and twice as fast.
struct Bfloat16Pairs {
  static constexpr int terms = 2;
  using Element = uint32_t;

  static DIFFGAP_HD uint32_t element(const BFloat16* source, int step, int depth) {
    const uint32_t high = 2 * step + 1 < depth ? source[2 * step + 1].bits : 0;
    return high << 16 | source[2 * step].bits;
  }
};

template <typename Width, typename T>
using OperandOf = std::conditional_t<Width::bfloat16_pairs && std::is_same_v<T, BFloat16>, Bfloat16Pairs, Floats>;

template <typename Operand>
DIFFGAP_HD int steps_of(int depth) {
  return (depth + Operand::terms - 1) / Operand::terms;
}

// One panel of `width` rows, transposed: out[k * width + i] = element k of row(i), with zeros for the rows beyond
// `count`. `row` maps 0 .. count - 1 to the rows' first elements.
template <typename Operand, int width, typename RowOf>
DIFFGAP_HD void pack_transposed(const RowOf& row, int count, int depth, typename Operand::Element* __restrict out) {
  constexpr int kStep = 16;
  const int all = steps_of<Operand>(depth);
  for (int first = 0; first < all; first += kStep) {
    const int steps = all - first < kStep ? all - first : kStep;
    auto* block = out + first * width;
    for (int i = 0; i < width; ++i) {
      if (i < count) {
        const auto* source = row(i);
        for (int k = 0; k < steps; ++k) block[k * width + i] = Operand::element(source, first + k, depth);
      } else {
        for (int k = 0; k < steps; ++k) block[k * width + i] = 0;
      }
    }
  }
}

// Rows first .. first + count of a matrix.
template <typename T>
struct Consecutive {
  Rows<T> rows;
  int64_t first;
  DIFFGAP_HD const T* operator()(int i) const { return rows.row(first + i); }
};

// Rows as panels of a left operand, or as columns of a product.
template <typename Operand, int width, typename T>
DIFFGAP_HD void pack_panels(const Rows<T>& rows, int64_t first, int count, typename Operand::Element* out) {
  const int64_t steps = steps_of<Operand>(rows.depth);
  for (int panel = 0; panel < count; panel += width) {
    const int valid = count - panel < width ? count - panel : width;
    pack_transposed<Operand, width>(Consecutive<T>{rows, first + panel}, valid, rows.depth, out + panel * steps);
  }
}

// Columns begin .. end of rows first .. first + count, as the rows offset .. of an operand of `total` rows: `width`
// columns a panel, with zeros for those beyond `end`.
template <int width, typename T>
DIFFGAP_HD void pack_columns(const Rows<T>& rows, int64_t first, int count, int begin, int end, int offset, int total,
                             float* out) {
  constexpr int kAhead = 8, kLineBytes = 64;
  for (int i = 0; i < count; ++i) {
    const T* source = rows.row(first + i);
    // Of each row only a piece is read, which the hardware does not see coming.
    const T* next = rows.row(first + (i + kAhead < count ? i + kAhead : i));
    for (int column = begin; column < end; column += kLineBytes / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(next + column);
    }
    for (int column = begin; column < end; column += width) {
      float* __restrict target = out + static_cast<int64_t>(column - begin) * total + (offset + i) * width;
      if (end - column >= width) {
        for (int k = 0; k < width; ++k) target[k] = widen(source[column + k]);
      } else {
        const int valid = end - column;
        for (int k = 0; k < width; ++k) target[k] = k < valid ? widen(source[column + k]) : 0.0f;
      }
    }
  }
}

// All columns, as a right operand.
template <typename T>
DIFFGAP_HD void pack_right(const Rows<T>& rows, int64_t first, int count, int offset, int total, float* out) {
  pack_columns<kRight>(rows, first, count, 0, rows.depth, offset, total, out);
}

template <int lanes>
struct Registers {
  typedef float Vector __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
  // As many accumulators as leave registers for the operands, two vectors wide.
  static constexpr int rows = lanes == 16 ? 12 : lanes == 8 ? 6 : 4;
  static constexpr int columns = 2 * lanes;
};

template <typename Vector>
DIFFGAP_HD void multiply_add(Vector& sum, const float& left, Vector right) {
  sum += left * right;
}

#if defined(__x86_64__) && defined(__GNUC__)
// In assembly, since an intrinsic needs its instruction set where it is written, not where it is inlined.
template <typename Vector>
DIFFGAP_HD void multiply_add(Vector& sum, const uint32_t& left, Vector right) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(right), "m"(left));
}
#endif

// The registers' part of a tile over one chunk of the depth.
template <int lanes, typename Element>
DIFFGAP_HD void multiply_registers(const Element* __restrict left, const Element* __restrict right, int steps,
                                   bool add, float* __restrict out, int64_t stride) {
  using Vector = typename Registers<lanes>::Vector;
  constexpr int kRows = Registers<lanes>::rows;
  Vector sum[kRows][2] = {};
  for (int k = 0; k < steps; ++k) {
    const Vector right0 = *reinterpret_cast<const Vector*>(right);
    const Vector right1 = *reinterpret_cast<const Vector*>(right + lanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      multiply_add(sum[i][0], left[i], right0);
      multiply_add(sum[i][1], left[i], right1);
    }
    left += kLeft;
    right += kRight;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    Vector* target0 = reinterpret_cast<Vector*>(out + i * stride);
    Vector* target1 = reinterpret_cast<Vector*>(out + i * stride + lanes);
    *target0 = add ? *target0 + sum[i][0] : sum[i][0];
    *target1 = add ? *target1 + sum[i][1] : sum[i][1];
  }
}

template <typename Width, typename Operand>
struct MultiplyTile {
  using Element = typename Operand::Element;
  using Part = Registers<Width::lanes>;

  static DIFFGAP_HD void run(const Element* left, const Element* right, int depth, bool add, float* out,
                             int64_t stride) {
    constexpr int kChunk = kDepthChunk / Operand::terms;
    const int steps = steps_of<Operand>(depth);
    for (int first = 0; first < steps; first += kChunk) {
      const int chunk = steps - first < kChunk ? steps - first : kChunk;
      for (int i = 0; i < kLeft; i += Part::rows) {
        for (int j = 0; j < kRight; j += Part::columns) {
          multiply_registers<Width::lanes>(left + first * kLeft + i, right + first * kRight + j, chunk,
                                           add || first > 0, out + i * stride + j, stride);
        }
      }
    }
    if (depth == 0 && !add) {
      for (int i = 0; i < kLeft; ++i) std::fill_n(out + i * stride, kRight, 0.0f);
    }
  }
};

// out (kLeft x kRight, rows `stride` apart) = left panel times right panel, added to what is there if `add`.
template <typename Width, typename Operand>
DIFFGAP_HD void multiply_tile(const typename Operand::Element* left, const typename Operand::Element* right,
                              int depth, bool add, float* out, int64_t stride) {
  run_apart<Width, MultiplyTile<Width, Operand>>(left, right, depth, add, out, stride);
}

}  // namespace diffgap
