// diffgap::q_sample and its backward on the CPU; diffgap/ops/q_sample.py has the definition.
#include "common/noising_math.h"
#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

template <typename Coefficient>
NoisingRow noising_row_of(const Tensor& table, int64_t row, int64_t target) {
  const Coefficient* coefficients = data_of<Coefficient>(table) + 2 * row;
  return noising_row(static_cast<float>(coefficients[0]), static_cast<float>(coefficients[1]), target);
}

// The rows of all samples of `x`.
std::vector<NoisingRow> noising_rows(const Tensor& t, const Tensor& table_in, const Tensor& x, int64_t target) {
  STD_TORCH_CHECK(target >= 0 && target < kTargets, "target: unknown index ", target);
  const Tensor table = checked_table(table_in, 2, x), indices = index_of("t", t, x.size(0));
  const int64_t* index = data_of<int64_t>(indices);
  const auto row_of = table.scalar_type() == ScalarType::Double ? noising_row_of<double> : noising_row_of<float>;
  std::vector<NoisingRow> rows(x.size(0));
  for (size_t i = 0; i < rows.size(); ++i) {
    check_row("t", index[i], table.size(0));
    rows[i] = row_of(table, index[i], target);
  }
  return rows;
}

template <typename T>
struct ForwardArgs {
  TileGrid grid;
  const NoisingRow* rows;
  const int64_t* seeds;
  const T* x0;
  T* x_t;
  T* target;
  T* noise;  // or null
};

template <int lanes, typename T>
DIFFGAP_HD void noise_elements(const ForwardArgs<T>& a, const NoisingRow& row, const float* drawn, int64_t at) {
  const Values<lanes> clean = load<lanes>(a.x0 + at), noise = load<lanes>(drawn);
  store<lanes>(a.x_t + at, row.alpha * clean + row.sigma * noise);
  store<lanes>(a.target + at, noising_target(row, clean, noise));
  if (a.noise) store<lanes>(a.noise + at, noise);
}

// Asks for the memory of a tile before its noise is drawn, which takes as long as to get it.
template <typename T>
DIFFGAP_HD void prefetch(const T* x, int n) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < n; i += kLine) __builtin_prefetch(x + i);
}

struct ForwardTiles {
  template <typename Width, typename T>
  static DIFFGAP_HD void run(const ForwardArgs<T>& a, int64_t first, int64_t last) {
    constexpr int lanes = Width::lanes;
    NoiseBuffer buffer;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t sample = a.grid.sample(tile), begin = a.grid.begin(tile);
      const int64_t at = sample * a.grid.count + begin;
      const int n = a.grid.width(begin);
      const NoisingRow row = a.rows[sample];
      for (const T* x : {a.x0, static_cast<const T*>(a.x_t), static_cast<const T*>(a.target)}) prefetch(x + at, n);
      const float* drawn =
          draw_tile<lanes>({static_cast<uint64_t>(a.seeds[sample]), 0, kStreamDraw}, begin, n, buffer);
      int i = 0;
      for (; i + lanes <= n; i += lanes) noise_elements<lanes>(a, row, drawn + i, at + i);
      for (; i < n; ++i) noise_elements<1>(a, row, drawn + i, at + i);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> q_sample(const Tensor& x0, const Tensor& t, const Tensor& table,
                                            const Tensor& seed, int64_t target, bool return_noise) {
  const TileGrid grid{x0.size(0), elements_per_sample(x0)};
  const std::vector<NoisingRow> rows = noising_rows(t, table, x0, target);
  const Tensor seeds = index_of("seed", seed, grid.samples), clean = dense(x0);
  const Tensor x_t = new_like(clean), wanted = new_like(clean);
  const Tensor noise =
      return_noise ? new_like(clean) : empty_of(clean, {0}, clean.scalar_type());
  for_dtype(clean.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const ForwardArgs<T> args{grid,
                              rows.data(),
                              data_of<int64_t>(seeds),
                              data_of<T>(clean),
                              mutable_data_of<T>(x_t),
                              mutable_data_of<T>(wanted),
                              return_noise ? mutable_data_of<T>(noise) : nullptr};
    torch::stable::parallel_for(0, grid.size(), kTilesPerThread, [&](int64_t first, int64_t last) {
      run_lanes<ForwardTiles>(args, first, last);
    });
  });
  return {x_t, wanted, noise};
}

template <typename T>
struct BackwardArgs {
  TileGrid grid;
  const NoisingRow* rows;
  const T* grad_x_t;
  const T* grad_target;
  T* grad_x0;
};

template <int lanes, typename T>
DIFFGAP_HD void pass_back(const BackwardArgs<T>& a, const NoisingRow& row, int64_t at) {
  store<lanes>(a.grad_x0 + at, row.alpha * load<lanes>(a.grad_x_t + at) + row.clean * load<lanes>(a.grad_target + at));
}

struct BackwardTiles {
  template <typename Width, typename T>
  static DIFFGAP_HD void run(const BackwardArgs<T>& a, int64_t first, int64_t last) {
    constexpr int lanes = Width::lanes;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t sample = a.grid.sample(tile), begin = a.grid.begin(tile);
      const int64_t at = sample * a.grid.count + begin;
      const int n = a.grid.width(begin);
      const NoisingRow row = a.rows[sample];
      int i = 0;
      for (; i + lanes <= n; i += lanes) pass_back<lanes>(a, row, at + i);
      for (; i < n; ++i) pass_back<1>(a, row, at + i);
    }
  }
};

Tensor q_sample_backward(const Tensor& grad_x_t, const Tensor& grad_target, const Tensor& t,
                         const Tensor& table, int64_t target) {
  STD_TORCH_CHECK(same_shape(grad_target, grad_x_t) && grad_target.scalar_type() == grad_x_t.scalar_type(),
                  "grad_target: expected the shape and dtype of grad_x_t");
  const TileGrid grid{grad_x_t.size(0), elements_per_sample(grad_x_t)};
  const std::vector<NoisingRow> rows = noising_rows(t, table, grad_x_t, target);
  const Tensor from_x_t = dense(grad_x_t);
  const Tensor from_target = dense(grad_target);
  const Tensor grad_x0 = new_like(from_x_t);
  for_dtype(grad_x_t.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const BackwardArgs<T> args{grid, rows.data(), data_of<T>(from_x_t), data_of<T>(from_target),
                               mutable_data_of<T>(grad_x0)};
    torch::stable::parallel_for(0, grid.size(), kTilesPerThread, [&](int64_t first, int64_t last) {
      run_lanes<BackwardTiles>(args, first, last);
    });
  });
  return grad_x0;
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  m.impl("q_sample", TORCH_BOX(&diffgap::q_sample));
  m.impl("q_sample_backward", TORCH_BOX(&diffgap::q_sample_backward));
}
