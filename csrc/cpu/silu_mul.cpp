// diffgap::silu_mul and its backward pass on the CPU; diffgap/ops/silu_mul.py has the definition.
#include <cstdint>
#include <vector>

#include "common/exp.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

// 1 / (1 + e**-x), and what it lacks to 1, neither by a difference that would cancel.
template <typename Float>
struct Logistic {
  Float value, rest;

  static DIFFGAP_HD Logistic of(Float x) {
    const Float e = exp_nonpositive<Float>(x > 0.0f ? -x : x);
    const Float inverse = 1.0f / (1.0f + e);
    return {x > 0.0f ? inverse : e * inverse, x > 0.0f ? e * inverse : inverse};
  }
};

template <typename T>
struct Forward {
  const T *gate, *up;
  T* out;

  template <int lanes>
  DIFFGAP_HD void at(int i) const {
    const Values<lanes> g = load<lanes>(gate + i);
    store<lanes>(out + i, g * Logistic<Values<lanes>>::of(g).value * load<lanes>(up + i));
  }
};

// With s the logistic function: dup = grad g s(g),  dgate = grad up s(g) (1 + g (1 - s(g))).
template <typename T>
struct Backward {
  const T *grad, *gate, *up;
  T *dgate, *dup;

  template <int lanes>
  DIFFGAP_HD void at(int i) const {
    const Values<lanes> g = load<lanes>(gate + i), by = load<lanes>(grad + i), u = load<lanes>(up + i);
    const auto s = Logistic<Values<lanes>>::of(g);
    store<lanes>(dgate + i, by * u * s.value * (1.0f + g * s.rest));
    store<lanes>(dup + i, by * g * s.value);
  }
};

// Rows of both halves, `width` elements each, and of what the pass reads and writes beside them.
template <typename T>
struct ForwardRows {
  template <typename Width>
  static DIFFGAP_HD void run(const T* pair, T* out, int width, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* gate = pair + 2 * row * width;
      for_each<Width::lanes>(Forward<T>{gate, gate + width, out + row * width}, width);
    }
  }
};

template <typename T>
struct BackwardRows {
  template <typename Width>
  static DIFFGAP_HD void run(const T* grad, const T* pair, T* dpair, int width, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = 2 * row * width;
      for_each<Width::lanes>(Backward<T>{grad + row * width, pair + at, pair + at + width, dpair + at,
                                         dpair + at + width},
                             width);
    }
  }
};

struct Shape {
  std::vector<int64_t> half;
  int64_t rows, width;

  explicit Shape(const Tensor& pair) : half(pair.sizes().begin(), pair.sizes().end()) {
    STD_TORCH_CHECK(!half.empty() && half.back() % 2 == 0, "silu_mul: expected an even number of columns");
    width = half.back() /= 2;
    rows = width ? pair.numel() / (2 * width) : 0;
  }
  // Rows that are worth waking a thread for.
  int64_t grain() const { return 1 + kTile * kTilesPerThread / width; }
};

Tensor silu_mul(const Tensor& pair_in) {
  const Tensor pair = dense(pair_in);
  const Shape shape(pair);
  const Tensor out = empty_of(pair, shape.half, pair.scalar_type());
  if (out.numel() == 0) return out;
  for_dtype(pair.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* from = data_of<T>(pair);
    T* to = mutable_data_of<T>(out);
    torch::stable::parallel_for(0, shape.rows, shape.grain(), [&](int64_t first, int64_t last) {
      run_lanes<ForwardRows<T>>(from, to, static_cast<int>(shape.width), first, last);
    });
  });
  return out;
}

Tensor silu_mul_backward(const Tensor& grad_in, const Tensor& pair_in) {
  const Tensor grad = dense(grad_in), pair = dense(pair_in);
  const Shape shape(pair);
  STD_TORCH_CHECK(2 * grad.numel() == pair.numel() && grad.scalar_type() == pair.scalar_type(),
                  "silu_mul_backward: grad does not fit pair in shape or dtype");
  const Tensor dpair = new_like(pair);
  if (pair.numel() == 0) return dpair;
  for_dtype(pair.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T *by = data_of<T>(grad), *from = data_of<T>(pair);
    T* to = mutable_data_of<T>(dpair);
    torch::stable::parallel_for(0, shape.rows, shape.grain(), [&](int64_t first, int64_t last) {
      run_lanes<BackwardRows<T>>(by, from, to, static_cast<int>(shape.width), first, last);
    });
  });
  return dpair;
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&diffgap::silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&diffgap::silu_mul_backward));
}
