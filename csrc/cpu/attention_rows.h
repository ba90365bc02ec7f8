// Rows of queries, keys and values: their way into float32 buffers, normalised if there is a weight, and the way of
// their gradients back.
#pragma once

#include <cmath>

#include "cpu/lanes.h"
#include "cpu/small_product.h"
#include "cpu/tensor.h"

namespace diffgap {

constexpr float kNormEpsilon = 1e-6f;

// A head of a batch element.
struct BatchHead {
  int64_t batch, head;
};

// A tensor (batch, tokens, heads, dim) of any strides but the last, which is 1.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, token, head;  // strides

  DIFFGAP_HD T* at(const BatchHead& pair) const { return data + pair.batch * batch + pair.head * head; }
};

template <int lanes, typename T>
DIFFGAP_HD void load_row(const T* source, int dim, float* out) {
  int c = 0;
  for (; c + lanes <= dim; c += lanes) store<lanes>(out + c, load<lanes>(source + c));
  if (c < dim) {
    for (int l = 0; l < lanes; ++l) out[c + l] = c + l < dim ? widen(source[c + l]) : 0.0f;
  }
}

template <int lanes, typename T>
DIFFGAP_HD void store_row(const float* row, int dim, T* out) {
  int c = 0;
  for (; c + lanes <= dim; c += lanes) store<lanes>(out + c, load<lanes>(row + c));
  for (; c < dim; ++c) store<1>(out + c, row[c]);
}

// Sizes of the rows and what is done to them.
struct RowShape {
  int dim, width;       // elements, and elements with padding
  const float* weight;  // of the norm, padded with zeros; or null

  // Whether rows of float32 need neither padding nor norm.
  DIFFGAP_HD bool as_they_are() const { return !weight && dim == width; }

  // 1 / sqrt(mean(x**2) + eps), given the sum of squares.
  DIFFGAP_HD float inverse_rms(float squares) const {
    return 1.0f / std::sqrt(squares / static_cast<float>(dim) + kNormEpsilon);
  }
};

// Calls `body` with the row's length as a compile-time number of vectors if it is a usual one, else with 0.
template <int lanes, typename Body>
DIFFGAP_HD void with_length(const RowShape& shape, const Body& body) {
  switch (shape.dim == shape.width ? shape.width / lanes : 0) {
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    default:
      return body(std::integral_constant<int, 0>{});
  }
}

// Rows are far apart, so that the processor does not foresee which it needs next.
template <typename T>
DIFFGAP_HD void prefetch_row(const T* row, int dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int offset = 0; offset < dim * static_cast<int>(sizeof(T)); offset += 64) __builtin_prefetch(bytes + offset, 0, 2);
}

template <typename Width, typename T>
struct StageRows {
  static constexpr int lanes = Width::lanes;
  using Vector = typename Registers<lanes>::Vector;

  static DIFFGAP_HD void run(const T* source, const T* next, int64_t stride, int count, const RowShape& shape,
                             const bool* mask, float* buffer) {
    with_length<lanes>(shape, [&](auto length) __attribute__((always_inline)) {
      constexpr int kLength = decltype(length)::value;
      const int vectors = kLength ? kLength : shape.width / lanes, dim = kLength ? kLength * lanes : shape.dim;
      for (int i = 0; i < count; ++i) {
        if (next) prefetch_row(next + i * stride, dim);
        Vector* row = reinterpret_cast<Vector*>(buffer + static_cast<int64_t>(i) * shape.width);
        if (mask && !mask[i]) {
          for (int v = 0; v < vectors; ++v) row[v] = Vector{};
          continue;
        }
        load_row<lanes>(source + i * stride, dim, reinterpret_cast<float*>(row));
        if (shape.weight) {
          Vector squares = {};
          for (int v = 0; v < vectors; ++v) squares += row[v] * row[v];
          const float inverse = shape.inverse_rms(sum_lanes<lanes>(squares));
          const Vector* weight = reinterpret_cast<const Vector*>(shape.weight);
          for (int v = 0; v < vectors; ++v) row[v] *= inverse * weight[v];
        }
      }
    });
  }
};

// Rows of up to this many tokens are read where they are, if nothing has to be done to them: more of them, a power of
// two apart, would fall on the same lines of the first-level cache.
constexpr int kInPlace = 16;

// `count` rows as float32, zeros where `mask` is false. In `buffer`, rows `shape.width` apart, unless they can stay.
// Those at `next`, if any, will be staged after these have been used.
template <typename Width, typename T>
DIFFGAP_HD Strip stage(const T* source, const T* next, int64_t stride, int count, const RowShape& shape,
                       const bool* mask, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (shape.as_they_are() && !mask && count <= kInPlace) return {source, stride};
  }
  run_apart<Width, StageRows<Width, T>>(source, next, stride, count, shape, mask, buffer);
  return {buffer, shape.width};
}

// Stores the gradients of `count` rows, given those of the staged rows in `gradient`, which is overwritten. With
// n = x / rms and u = weight * gradient, that of x is (u - n * mean(u * n)) / rms, and n * gradient adds to that of
// the weight.
template <typename Width, typename T>
struct StoreGradients {
  static constexpr int lanes = Width::lanes;
  using Vector = typename Registers<lanes>::Vector;

  static DIFFGAP_HD void run(float* gradient, const T* source, int64_t source_stride, int count, const RowShape& shape,
                             const bool* mask, float* weight_gradient, float* scratch, T* out, int64_t out_stride) {
    with_length<lanes>(shape, [&](auto length) __attribute__((always_inline)) {
      constexpr int kLength = decltype(length)::value;
      const int vectors = kLength ? kLength : shape.width / lanes, dim = kLength ? kLength * lanes : shape.dim;
      for (int i = 0; i < count; ++i) {
        Vector* row = reinterpret_cast<Vector*>(gradient + static_cast<int64_t>(i) * shape.width);
        if (shape.weight && (!mask || mask[i])) {
          load_row<lanes>(source + i * source_stride, dim, scratch);
          Vector* normed = reinterpret_cast<Vector*>(scratch);
          Vector squares = {}, products = {};
          for (int v = 0; v < vectors; ++v) squares += normed[v] * normed[v];
          const float inverse = shape.inverse_rms(sum_lanes<lanes>(squares));
          const Vector* weight = reinterpret_cast<const Vector*>(shape.weight);
          Vector* sums = reinterpret_cast<Vector*>(weight_gradient);
          for (int v = 0; v < vectors; ++v) {
            normed[v] *= inverse;
            const Vector product = normed[v] * row[v];
            sums[v] += product;
            products += weight[v] * product;
            row[v] *= weight[v];
          }
          const float mean = sum_lanes<lanes>(products) / static_cast<float>(dim);
          for (int v = 0; v < vectors; ++v) row[v] = inverse * (row[v] - mean * normed[v]);
        }
        store_row<lanes>(reinterpret_cast<const float*>(row), dim, out + i * out_stride);
      }
    });
  }
};

template <typename Width, typename T>
DIFFGAP_HD void store_gradients(float* gradient, const T* source, int64_t source_stride, int count,
                                const RowShape& shape, const bool* mask, float* weight_gradient, float* scratch, T* out,
                                int64_t out_stride) {
  run_apart<Width, StoreGradients<Width, T>>(gradient, source, source_stride, count, shape, mask, weight_gradient,
                                             scratch, out, out_stride);
}

}  // namespace diffgap
