// Products of matrices of one attention head, in float32: too small to be worth packing as in product.h.
//
// Of `out = left * right` the right operand and the result are rows whose elements stand in a vector's lanes; the
// left operand is read element by element, each multiplied with a row, so its strides are free. Where a lane's row
// belongs to one of several heads, the left operand holds their elements side by side (`interleave`).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/product.h"

namespace diffgap {

// Two vectors' elements, those of a first, at compile-time places.
template <typename Vector, typename Order, size_t... I>
DIFFGAP_HD Vector select(Vector a, Vector b, Order order, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, order(static_cast<int>(I))...);
}

template <int lanes, typename Order>
DIFFGAP_HD typename Registers<lanes>::Vector select(typename Registers<lanes>::Vector a,
                                                    typename Registers<lanes>::Vector b, Order order) {
  return select(a, b, order, std::make_index_sequence<lanes>{});
}

// Units of `size` elements of a and b in turn, from the lower or upper half of every 128 bits.
template <int lanes, int size, bool upper, typename Vector>
DIFFGAP_HD Vector unpack(Vector a, Vector b) {
  return select<lanes>(a, b, [](int lane) constexpr {
    const int unit = lane % 4 / size;
    return lane / 4 * 4 + (upper ? 2 : 0) + unit / 2 * size + lane % size + (unit % 2 ? lanes : 0);
  });
}

// The even or odd 128-bit blocks of a, then those of b.
template <int lanes, bool odd, typename Vector>
DIFFGAP_HD Vector take_blocks(Vector a, Vector b) {
  return select<lanes>(a, b, [](int lane) constexpr {
    const int block = lane / 4 * 2 + (odd ? 1 : 0);
    return block * 4 + lane % 4;
  });
}

// Transposes a square of `lanes` vectors.
template <int lanes>
DIFFGAP_HD void transpose(typename Registers<lanes>::Vector* __restrict rows) {
  using Vector = typename Registers<lanes>::Vector;
  constexpr int kBlocks = lanes / 4;
  // First squares of four within 128 bits: columns[q][s] has column 4 b + s of rows 4 q .. 4 q + 3 in block b.
  Vector columns[kBlocks][4];
#pragma GCC unroll 4
  for (int q = 0; q < kBlocks; ++q) {
    const Vector* r = rows + 4 * q;
    const Vector low0 = unpack<lanes, 1, false>(r[0], r[1]), low1 = unpack<lanes, 1, false>(r[2], r[3]);
    const Vector high0 = unpack<lanes, 1, true>(r[0], r[1]), high1 = unpack<lanes, 1, true>(r[2], r[3]);
    columns[q][0] = unpack<lanes, 2, false>(low0, low1);
    columns[q][1] = unpack<lanes, 2, true>(low0, low1);
    columns[q][2] = unpack<lanes, 2, false>(high0, high1);
    columns[q][3] = unpack<lanes, 2, true>(high0, high1);
  }
  // Then the square of blocks.
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    if constexpr (kBlocks == 1) {
      rows[s] = columns[0][s];
    } else if constexpr (kBlocks == 2) {
      rows[s] = take_blocks<lanes, false>(columns[0][s], columns[1][s]);
      rows[4 + s] = take_blocks<lanes, true>(columns[0][s], columns[1][s]);
    } else {
      const Vector even0 = take_blocks<lanes, false>(columns[0][s], columns[1][s]);
      const Vector even1 = take_blocks<lanes, false>(columns[2][s], columns[3][s]);
      const Vector odd0 = take_blocks<lanes, true>(columns[0][s], columns[1][s]);
      const Vector odd1 = take_blocks<lanes, true>(columns[2][s], columns[3][s]);
      rows[s] = take_blocks<lanes, false>(even0, even1);
      rows[8 + s] = take_blocks<lanes, true>(even0, even1);
      rows[4 + s] = take_blocks<lanes, false>(odd0, odd1);
      rows[12 + s] = take_blocks<lanes, true>(odd0, odd1);
    }
  }
}

// Where `interleave` puts element `column` of a chunk of `lanes`: the order in which its shuffles produce them.
template <int lanes, int heads>
constexpr int slot_of(int column) {
  constexpr int kTogether = 4 / heads;
  return column % 4 / kTogether * (lanes / heads) + column / 4 * kTogether + column % kTogether;
}

// A row of each of `heads` heads, side by side: element `column` of head g at out[slot_of(column) * heads + g].
template <int lanes, int heads>
DIFFGAP_HD void interleave(const float* const* rows, int width, float* __restrict out) {
  using Vector = typename Registers<lanes>::Vector;
  for (int first = 0; first < width; first += lanes) {
    Vector in[heads];
#pragma GCC unroll 4
    for (int g = 0; g < heads; ++g) in[g] = *reinterpret_cast<const Vector*>(rows[g] + first);
    Vector* to = reinterpret_cast<Vector*>(out + first * heads);
    const Vector low0 = unpack<lanes, 1, false>(in[0], in[1]), high0 = unpack<lanes, 1, true>(in[0], in[1]);
    if constexpr (heads == 2) {
      to[0] = low0;
      to[1] = high0;
    } else {
      const Vector low1 = unpack<lanes, 1, false>(in[2], in[3]), high1 = unpack<lanes, 1, true>(in[2], in[3]);
      to[0] = unpack<lanes, 2, false>(low0, low1);
      to[1] = unpack<lanes, 2, true>(low0, low1);
      to[2] = unpack<lanes, 2, false>(high0, high1);
      to[3] = unpack<lanes, 2, true>(high0, high1);
    }
  }
}

// `heads` neighbours, repeated over all lanes.
template <int lanes, int heads, size_t... I>
DIFFGAP_HD typename Registers<lanes>::Vector spread(const float* source, std::index_sequence<I...>) {
  if constexpr (heads == 2) {
    typedef double Pairs __attribute__((vector_size(4 * lanes)));
    double pair;
    std::memcpy(&pair, source, sizeof(pair));
    const Pairs pairs = {(I % 2 ? pair : pair)...};
    return reinterpret_cast<typename Registers<lanes>::Vector>(pairs);
  } else {
    static_assert(heads == 4 && lanes == 16);
    typename Registers<lanes>::Vector result;
#if defined(__x86_64__) && defined(__GNUC__)
    struct Four {
      float values[4];
    };
    asm("vbroadcastf32x4 %1, %0" : "=v"(result) : "m"(*reinterpret_cast<const Four*>(source)));
#endif
    return result;
  }
}

// A matrix whose rows are contiguous.
struct Strip {
  const float* data;
  int64_t stride;
};

// The left operand: element (i, t) at data[i * row + t * term], `heads` of them side by side.
struct Scalars {
  const float* data;
  int64_t row, term;
};

template <int lanes, int heads, int kRows, int kVectors>
DIFFGAP_HD void multiply_block(Scalars left, Strip right, int terms, bool add, float* __restrict out,
                               int64_t out_stride) {
  using Vector = typename Registers<lanes>::Vector;
  Vector sum[kRows][kVectors] = {};
  const float* __restrict scalars = left.data;
  const float* __restrict row = right.data;
  for (int t = 0; t < terms; ++t) {
    Vector values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) values[v] = *reinterpret_cast<const Vector*>(row + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if constexpr (heads == 1) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += scalars[i * left.row] * values[v];
      } else {
        const Vector factor = spread<lanes, heads>(scalars + i * left.row, std::make_index_sequence<lanes / 2>{});
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * values[v];
      }
    }
    scalars += left.term;
    row += right.stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector* target = reinterpret_cast<Vector*>(out + i * out_stride + v * lanes);
      *target = add ? *target + sum[i][v] : sum[i][v];
    }
  }
}

template <int lanes, int heads, int kVectors>
DIFFGAP_HD void multiply_columns(Scalars left, int rows, Strip right, int terms, bool add, float* out,
                                 int64_t out_stride) {
  // Eight sums are needed to hide the latency of the multiply-add.
  constexpr int kRows = kVectors * 4 < 8 ? 8 : 4;
  int i = 0;
  for (; i + kRows <= rows; i += kRows) {
    multiply_block<lanes, heads, kRows, kVectors>(left, right, terms, add, out, out_stride);
    left.data += kRows * left.row;
    out += kRows * out_stride;
  }
  if (kRows == 8 && i + 4 <= rows) {
    multiply_block<lanes, heads, 4, kVectors>(left, right, terms, add, out, out_stride);
    left.data += 4 * left.row;
    out += 4 * out_stride;
    i += 4;
  }
  switch (rows - i) {
    case 3:
      return multiply_block<lanes, heads, 3, kVectors>(left, right, terms, add, out, out_stride);
    case 2:
      return multiply_block<lanes, heads, 2, kVectors>(left, right, terms, add, out, out_stride);
    case 1:
      return multiply_block<lanes, heads, 1, kVectors>(left, right, terms, add, out, out_stride);
  }
}

// out (rows x width) = left (rows x terms) * right (terms x width), added to what is there if `add`; `width` is a
// multiple of `lanes`.
template <typename Width, int heads>
struct Multiply {
  static constexpr int lanes = Width::lanes;
  // Rows of the right operand that stay in the first-level cache while all rows of the left one pass.
  static constexpr int kTerms = 128;

  static DIFFGAP_HD void run(const Scalars& left, int rows, const Strip& right, int terms, int width, bool add,
                             float* out, int64_t out_stride) {
    for (int first = 0; first < terms || (first == 0 && !add); first += kTerms) {
      const int chunk = terms - first < kTerms ? terms - first : kTerms;
      const Scalars scalars{left.data + first * left.term, left.row, left.term};
      for (int column = 0; column < width;) {
        const Strip strip{right.data + first * right.stride + column, right.stride};
        column += columns(scalars, rows, strip, chunk, width - column, add || first > 0, out + column, out_stride);
      }
    }
  }

 private:
  static DIFFGAP_HD int columns(Scalars left, int rows, Strip right, int terms, int width, bool add, float* out,
                                int64_t out_stride) {
    if constexpr (lanes == 16) {
      if (width >= 4 * lanes) {
        multiply_columns<lanes, heads, 4>(left, rows, right, terms, add, out, out_stride);
        return 4 * lanes;
      }
      if (width == 3 * lanes) {
        multiply_columns<lanes, heads, 3>(left, rows, right, terms, add, out, out_stride);
        return 3 * lanes;
      }
    }
    if (width >= 2 * lanes) {
      multiply_columns<lanes, heads, 2>(left, rows, right, terms, add, out, out_stride);
      return 2 * lanes;
    }
    multiply_columns<lanes, heads, 1>(left, rows, right, terms, add, out, out_stride);
    return lanes;
  }
};

template <typename Width, int heads = 1>
DIFFGAP_HD void multiply(const Scalars& left, int rows, const Strip& right, int terms, int width, bool add, float* out,
                         int64_t out_stride) {
  run_apart<Width, Multiply<Width, heads>>(left, rows, right, terms, width, add, out, out_stride);
}

}  // namespace diffgap
