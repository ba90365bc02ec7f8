// diffgap::q_sample and its backward on the CPU; diffgap/ops/q_sample.py has the definition.
#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

// x_t = alpha * x0 + sigma * noise, target = clean * x0 + noisy * noise
struct NoisingRow {
  float alpha, sigma, clean, noisy;
};

enum Target : int64_t { kEpsilon, kSample, kVPrediction, kFlowPrediction };  // TARGETS in q_sample.py

NoisingRow noising_row(const double* coefficients, int64_t target) {
  const float alpha = static_cast<float>(coefficients[0]), sigma = static_cast<float>(coefficients[1]);
  switch (target) {
    case kEpsilon:
      return {alpha, sigma, 0.0f, 1.0f};
    case kSample:
      return {alpha, sigma, 1.0f, 0.0f};
    case kVPrediction:
      return {alpha, sigma, -sigma, alpha};
    case kFlowPrediction:
      return {alpha, sigma, -1.0f, 1.0f};
    default:
      STD_TORCH_CHECK(false, "target: unknown index ", target);
  }
}

// The rows of all samples.
std::vector<NoisingRow> noising_rows(const Tensor& t, const Tensor& table, int64_t samples, int64_t target) {
  const Tensor indices = index_of("t", t, samples), wide = table_of(table, 2);
  const int64_t* index = data_of<int64_t>(indices);
  std::vector<NoisingRow> rows(samples);
  for (int64_t i = 0; i < samples; ++i) {
    check_row("t", index[i], wide.size(0));
    rows[i] = noising_row(data_of<double>(wide) + 2 * index[i], target);
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

struct ForwardTiles {
  template <typename T>
  static DIFFGAP_HD void run(const ForwardArgs<T>& a, int64_t first, int64_t last) {
    NoiseBuffer drawn;
    alignas(64) float loaded[kTile], x_t_buffer[kTile], target_buffer[kTile];
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t sample = a.grid.sample(tile), begin = a.grid.begin(tile);
      const int64_t at = sample * a.grid.count + begin;
      const int n = a.grid.width(begin);
      const NoisingRow row = a.rows[sample];
      const float* __restrict noise =
          draw_tile({static_cast<uint64_t>(a.seeds[sample]), 0, kStreamDraw}, begin, n, drawn);
      const float* __restrict x0 = load_tile(a.x0 + at, n, loaded);
      float* __restrict x_t = open_tile(a.x_t + at, x_t_buffer);
      float* __restrict target = open_tile(a.target + at, target_buffer);
      for (int i = 0; i < n; ++i) {
        const float clean = x0[i];
        x_t[i] = row.alpha * clean + row.sigma * noise[i];
        target[i] = row.clean * clean + row.noisy * noise[i];
      }
      close_tile(a.x_t + at, n, x_t);
      close_tile(a.target + at, n, target);
      if (a.noise) {
        float* __restrict kept = open_tile(a.noise + at, x_t_buffer);
        for (int i = 0; i < n; ++i) kept[i] = noise[i];
        close_tile(a.noise + at, n, kept);
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> q_sample(const Tensor& x0, const Tensor& t, const Tensor& table,
                                            const Tensor& seed, int64_t target, bool return_noise) {
  const TileGrid grid{x0.size(0), elements_per_sample(x0)};
  const std::vector<NoisingRow> rows = noising_rows(t, table, grid.samples, target);
  const Tensor seeds = index_of("seed", seed, grid.samples), clean = torch::stable::contiguous(x0);
  const Tensor x_t = torch::stable::empty_like(clean), wanted = torch::stable::empty_like(clean);
  const Tensor noise =
      return_noise ? torch::stable::empty_like(clean) : empty_of(clean, {0}, clean.scalar_type());
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
      run_vectorised<ForwardTiles>(args, first, last);
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

struct BackwardTiles {
  template <typename T>
  static DIFFGAP_HD void run(const BackwardArgs<T>& a, int64_t first, int64_t last) {
    alignas(64) float x_t_buffer[kTile], target_buffer[kTile], x0_buffer[kTile];
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t sample = a.grid.sample(tile), begin = a.grid.begin(tile);
      const int64_t at = sample * a.grid.count + begin;
      const int n = a.grid.width(begin);
      const NoisingRow row = a.rows[sample];
      const float* __restrict grad_x_t = load_tile(a.grad_x_t + at, n, x_t_buffer);
      const float* __restrict grad_target = load_tile(a.grad_target + at, n, target_buffer);
      float* __restrict grad_x0 = open_tile(a.grad_x0 + at, x0_buffer);
      for (int i = 0; i < n; ++i) grad_x0[i] = row.alpha * grad_x_t[i] + row.clean * grad_target[i];
      close_tile(a.grad_x0 + at, n, grad_x0);
    }
  }
};

Tensor q_sample_backward(const Tensor& grad_x_t, const Tensor& grad_target, const Tensor& t,
                         const Tensor& table, int64_t target) {
  const TileGrid grid{grad_x_t.size(0), elements_per_sample(grad_x_t)};
  const std::vector<NoisingRow> rows = noising_rows(t, table, grid.samples, target);
  const Tensor from_x_t = torch::stable::contiguous(grad_x_t);
  const Tensor from_target = torch::stable::contiguous(grad_target);
  const Tensor grad_x0 = torch::stable::empty_like(from_x_t);
  for_dtype(grad_x_t.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const BackwardArgs<T> args{grid, rows.data(), data_of<T>(from_x_t), data_of<T>(from_target),
                               mutable_data_of<T>(grad_x0)};
    torch::stable::parallel_for(0, grid.size(), kTilesPerThread, [&](int64_t first, int64_t last) {
      run_vectorised<BackwardTiles>(args, first, last);
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
