// Rows of queries, keys and values: their way into float32 buffers, normalised if there is a weight, and the way of
// their gradients back.
#pragma once

#include <cmath>

#include "cpu/small_product.h"
#include "cpu/tensor.h"

namespace diffgap {

constexpr float kNormEpsilon = 1e-6f;

// A tensor (batch, tokens, heads, dim) of any strides but the last, which is 1. A pair is a batch element and a head.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, token, head;  // strides
  int64_t heads;               // how many

  DIFFGAP_HD T* at(int64_t pair) const { return data + pair / heads * batch + pair % heads * head; }
};

template <int lanes, typename T>
DIFFGAP_HD void load_row(const T* __restrict source, int dim, float* __restrict out) {
  int c = 0;
  for (; c + lanes <= dim; c += lanes) {
    for (int l = 0; l < lanes; ++l) out[c + l] = widen(source[c + l]);
  }
  if (c < dim) {
    for (int l = 0; l < lanes; ++l) out[c + l] = c + l < dim ? widen(source[c + l]) : 0.0f;
  }
}

template <int lanes, typename T>
DIFFGAP_HD void store_row(const float* __restrict row, int dim, T* __restrict out) {
  int c = 0;
  for (; c + lanes <= dim; c += lanes) {
    for (int l = 0; l < lanes; ++l) {
      if constexpr (std::is_same_v<T, float>) {
        out[c + l] = row[c + l];
      } else {
        narrow(row[c + l], out + c + l);
      }
    }
  }
  for (; c < dim; ++c) {
    if constexpr (std::is_same_v<T, float>) {
      out[c] = row[c];
    } else {
      narrow(row[c], out + c);
    }
  }
}

// Inner product of rows whose length is a multiple of `lanes`.
template <int lanes>
DIFFGAP_HD float inner_product(const float* __restrict a, const float* __restrict b, int width) {
  alignas(64) float sums[lanes] = {};
  for (int c = 0; c < width; c += lanes) {
    for (int l = 0; l < lanes; ++l) sums[l] += a[c + l] * b[c + l];
  }
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

// 1 / sqrt(mean(x**2) + eps) of a row padded with zeros.
template <int lanes>
DIFFGAP_HD float inverse_rms(const float* row, int dim, int width) {
  return 1.0f / std::sqrt(inner_product<lanes>(row, row, width) / static_cast<float>(dim) + kNormEpsilon);
}

// Sizes of the rows and what is done to them.
struct RowShape {
  int dim, width;        // elements, and elements with padding
  const float* weight;   // of the norm, padded with zeros; or null

  // Whether rows of float32 need neither padding nor norm.
  DIFFGAP_HD bool as_they_are() const { return !weight && dim == width; }
};

// Rows of up to this many tokens are read where they are, if nothing has to be done to them: more of them, a power of
// two apart, would fall on the same lines of the first-level cache.
constexpr int kInPlace = 16;

// Rows are far apart, so that the processor does not foresee which it needs next.
template <typename T>
DIFFGAP_HD void prefetch_row(const T* row, int dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (size_t offset = 0; offset < dim * sizeof(T); offset += 64) __builtin_prefetch(bytes + offset, 0, 2);
}

// `count` rows as float32, zeros where `mask` is false. In `buffer`, rows `shape.width` apart, unless they can stay.
// Those at `next`, if any, will be staged after these have been used.
template <int lanes, typename T>
DIFFGAP_HD Strip stage(const T* source, const T* next, int64_t stride, int count, const RowShape& shape,
                       const bool* mask, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (shape.as_they_are() && !mask && count <= kInPlace) return {source, stride};
  }
  for (int i = 0; i < count; ++i) {
    if (next) prefetch_row(next + i * stride, shape.dim);
    float* __restrict row = buffer + static_cast<int64_t>(i) * shape.width;
    if (mask && !mask[i]) {
      for (int c = 0; c < shape.width; ++c) row[c] = 0.0f;
      continue;
    }
    load_row<lanes>(source + i * stride, shape.dim, row);
    if (shape.weight) {
      const float inverse = inverse_rms<lanes>(row, shape.dim, shape.width);
      for (int c = 0; c < shape.width; ++c) row[c] *= inverse * shape.weight[c];
    }
  }
  return {buffer, shape.width};
}

// Stores the gradients of `count` rows, given those of the staged rows in `gradient`, which is overwritten. With
// n = x / rms and u = weight * gradient, that of x is (u - n * mean(u * n)) / rms, and n * gradient adds to that of
// the weight.
template <int lanes, typename T>
DIFFGAP_HD void store_gradients(float* gradient, const T* source, int64_t source_stride, int count,
                                const RowShape& shape, const bool* mask, float* __restrict weight_gradient,
                                float* __restrict scratch, T* out, int64_t out_stride) {
  for (int i = 0; i < count; ++i) {
    float* __restrict row = gradient + static_cast<int64_t>(i) * shape.width;
    if (shape.weight && (!mask || mask[i])) {
      load_row<lanes>(source + i * source_stride, shape.dim, scratch);
      const float inverse = inverse_rms<lanes>(scratch, shape.dim, shape.width);
      for (int c = 0; c < shape.width; ++c) {
        scratch[c] *= inverse;
        weight_gradient[c] += scratch[c] * row[c];
        row[c] *= shape.weight[c];
      }
      const float mean = inner_product<lanes>(row, scratch, shape.width) / static_cast<float>(shape.dim);
      for (int c = 0; c < shape.width; ++c) row[c] = inverse * (row[c] - scratch[c] * mean);
    }
    store_row<lanes>(row, shape.dim, out + i * out_stride);
  }
}

}  // namespace diffgap
