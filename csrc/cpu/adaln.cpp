// diffgap::adaln and its backward pass on the CPU; diffgap/ops/adaln.py has the definition, adaln_rows.h the passes
// over a row.
#include <algorithm>
#include <type_traits>

#include "cpu/adaln_rows.h"
#include "cpu/isa.h"
#include "cpu/product.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

using namespace adaln_rows;

// Tokens whose gradients are summed by one job. The sums of a sample's jobs are added in the order of its tokens, so
// results do not depend on the number of threads, and one long sample occupies them all.
constexpr int64_t kChunk = 32;
constexpr int kSums = 3;
// Elements that are worth waking a thread for.
constexpr int64_t kGrain = kTile * kTilesPerThread;
// Results of a call that moves more than the third-level cache holds are written past it: none would be found there
// again, and a line that is to be overwritten need not be fetched.
constexpr int64_t kCacheBytes = 32 << 20;
constexpr int kLine = 64;

// A row per token of every sample, features next to each other; `by_token` is 0 where the tokens share one.
template <typename T>
struct TokenRows {
  const T* data;  // or null
  int64_t by_sample, by_token;

  DIFFGAP_HD const T* at(int64_t sample, int64_t token) const { return data + sample * by_sample + token * by_token; }
};

template <typename T>
struct Inputs {
  int64_t tokens;
  int width;
  bool gated, shared;  // whether there is a branch, and whether the tokens of a sample share the modulation
  bool past;           // whether results of the shape of x go past the caches
  TokenRows<T> x, branch, gate, shift, scale, grad_y, grad_h;
};

template <typename T>
struct Outputs {
  T *y, *h;
};

template <typename T>
struct GradientOutputs {
  T *dx, *dbranch, *dgate, *dshift, *dscale;  // the second and third are null without a branch
};

template <typename T>
struct ForwardRows {
  template <typename Width>
  static DIFFGAP_HD void run(const Inputs<T>& in, const Outputs<T>& out, float* scratch, int64_t first, int64_t last) {
    in.past ? rows<Width::lanes, true>(in, out, scratch, first, last)
            : rows<Width::lanes, false>(in, out, scratch, first, last);
  }

 private:
  // `scratch` has room for a row.
  template <int lanes, bool kPast>
  static DIFFGAP_HD void rows(const Inputs<T>& in, const Outputs<T>& out, float* scratch, int64_t first,
                              int64_t last) {
    const int n = in.width;
    // In float32, y is its own result, unless that is out of reach.
    constexpr bool kCopy = kPast || !std::is_same_v<T, float>;
    for (int64_t row = first; row < last; ++row) {
      const int64_t sample = row / in.tokens, token = row % in.tokens, at = row * n;
      const T *x = in.x.at(sample, token), *shift = in.shift.at(sample, token), *scale = in.scale.at(sample, token);
      float sum;
      if (in.gated) {
        float* y = scratch;
        if constexpr (!kCopy) y = out.y + at;
        const T *branch = in.branch.at(sample, token), *gate = in.gate.at(sample, token);
        reduce<lanes>(AddBranch<T, kCopy, kPast>{x, branch, gate, y, out.y + at}, n, &sum);
        modulate<lanes, kPast>(y, sum / n, shift, scale, n, out.h + at);
      } else {
        reduce<lanes>(Sum<T>{x}, n, &sum);
        modulate<lanes, kPast>(x, sum / n, shift, scale, n, out.h + at);
      }
    }
  }

  template <int lanes, bool kPast, typename Y>
  static DIFFGAP_HD void modulate(const Y* y, float mean, const T* shift, const T* scale, int n, T* h) {
    float moments[Moments<Y>::sums];
    reduce<lanes>(Moments<Y>{y, mean}, n, moments);
    for_each<lanes>(Modulate<T, Y, kPast>{y, shift, scale, Norm::of(mean, moments, n), h}, n);
  }
};

// A row of float32, and one of zeros.
class Scratch {
 public:
  explicit Scratch(int width) : zeros_(round_up(width, kAligned) + kApart), memory_(2 * zeros_) {
    std::fill_n(memory_.data() + zeros_, width, 0.0f);
  }
  float* row() const { return memory_.data(); }
  const void* zeros() const { return memory_.data() + zeros_; }

 private:
  static constexpr int64_t kAligned = 16;
  // Rows a multiple of 4 KiB apart would share the lines of the first-level cache, and stores to one hold up loads of
  // another.
  static constexpr int64_t kApart = 5 * kAligned;
  int64_t zeros_;
  Buffer<float> memory_;
};

// The gradients of tokens `token` to `end` of a sample. Of modulation that they share, `sums` (kSums, width) gets the
// gradients' sums in float32: gate, shift, scale.
template <typename T>
struct BackwardRows {
  template <typename Width>
  static DIFFGAP_HD void run(const Inputs<T>& in, const GradientOutputs<T>& out, const Scratch& s, float* sums,
                             int64_t sample, int64_t token, int64_t end) {
    constexpr int lanes = Width::lanes;
    if (in.gated) {
      in.past ? rows<lanes, true, true>(in, out, s, sums, sample, token, end)
              : rows<lanes, true, false>(in, out, s, sums, sample, token, end);
    } else {
      in.past ? rows<lanes, false, true>(in, out, s, sums, sample, token, end)
              : rows<lanes, false, false>(in, out, s, sums, sample, token, end);
    }
  }

 private:
  template <int lanes, bool kGated, bool kPast>
  static DIFFGAP_HD void rows(const Inputs<T>& in, const GradientOutputs<T>& out, const Scratch& s, float* sums,
                              int64_t sample, int64_t token, int64_t end) {
    using Y = std::conditional_t<kGated, float, T>;
    const int n = in.width;
    if (in.shared) std::fill_n(sums, kSums * n, 0.0f);
    for (; token < end; ++token) {
      const int64_t at = (sample * in.tokens + token) * n;
      const T *x = in.x.at(sample, token), *branch = nullptr, *gate = nullptr;
      const T *scale = in.scale.at(sample, token), *grad_h = in.grad_h.at(sample, token);
      const T* grad_y = in.grad_y.data ? in.grad_y.at(sample, token) : static_cast<const T*>(s.zeros());
      const Y* y;
      float sum, moments[GradientMoments<T, Y>::sums];
      if constexpr (kGated) {
        branch = in.branch.at(sample, token), gate = in.gate.at(sample, token);
        float* row = s.row();
        // y waits where dx will stand: a row less in the first-level cache, which the streams nearly fill.
        if constexpr (std::is_same_v<T, float> && !kPast) row = out.dx + at;
        reduce<lanes>(AddBranch<T, false, false>{x, branch, gate, row, nullptr}, n, &sum);
        y = row;
      } else {
        reduce<lanes>(Sum<T>{x}, n, &sum);
        y = x;
      }
      reduce<lanes>(GradientMoments<T, Y>{y, grad_h, scale, sum / n}, n, moments);
      const Norm norm = Norm::of(sum / n, moments, n);
      const float mean_a = moments[2] / n, mean_a_normed = (moments[3] * norm.rstd - moments[2] * norm.offset) / n;
      T* dbranch = kGated ? out.dbranch + at : nullptr;
      if (in.shared) {
        for_each<lanes>(Gradients<T, Y, kGated, true, kPast>{y, grad_y, grad_h, branch, gate, scale, norm, mean_a,
                                                             mean_a_normed, out.dx + at, dbranch, sums, sums + n,
                                                             sums + 2 * n},
                        n);
      } else {
        for_each<lanes>(Gradients<T, Y, kGated, false, kPast>{y, grad_y, grad_h, branch, gate, scale, norm, mean_a,
                                                              mean_a_normed, out.dx + at, dbranch,
                                                              kGated ? out.dgate + at : nullptr, out.dshift + at,
                                                              out.dscale + at},
                        n);
      }
    }
  }
};

// The gradients of a sample's modulation, from the sums of its jobs.
struct MergeSums {
  template <typename T>
  static DIFFGAP_HD void run(float* sums, int64_t jobs, int n, const GradientOutputs<T>& out, int64_t sample) {
    T* const targets[kSums] = {out.dgate, out.dshift, out.dscale};
    for (int k = 0; k < kSums; ++k) {
      if (!targets[k]) continue;
      float* __restrict total = sums + k * n;
      for (int64_t job = 1; job < jobs; ++job) {
        const float* __restrict part = total + job * kSums * n;
        for (int i = 0; i < n; ++i) total[i] += part[i];
      }
      T* target = targets[k] + sample * n;
      if constexpr (std::is_same_v<T, float>) {
        std::copy_n(total, n, target);
      } else {
        for (int i = 0; i < n; ++i) narrow(total[i], target + i);
      }
    }
  }
};

// Checked, and copied where features do not lie next to each other. `dims` is 2 for a row per sample, 3 per token.
std::optional<Tensor> rows_of(const char* name, const std::optional<Tensor>& rows, const Tensor& x, int64_t dims) {
  if (!rows) return std::nullopt;
  STD_TORCH_CHECK(rows->dim() == dims && rows->size(0) == x.size(0) && rows->size(dims - 1) == x.size(2) &&
                      (dims == 2 || rows->size(1) == x.size(1)) && rows->scalar_type() == x.scalar_type(),
                  "adaln: ", name, " does not fit x in shape or dtype");
  const bool adjacent = rows->size(dims - 1) == 1 || rows->stride(dims - 1) == 1;
  return adjacent ? *rows : dense(*rows);
}

// Whether results go past the caches, given how many tensors of x's shape the call moves.
bool goes_past_caches(const Tensor& x, int64_t tensors) {
  const int64_t bytes = x.scalar_type() == ScalarType::Float ? 4 : 2;
  return x.size(2) * bytes % kLine == 0 && x.numel() * bytes * tensors > kCacheBytes;
}

bool starts_line(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kLine == 0; }

template <typename T>
TokenRows<T> view_of(const std::optional<Tensor>& rows) {
  if (!rows) return {nullptr, 0, 0};
  return {data_of<T>(*rows), rows->stride(0), rows->dim() == 3 ? rows->stride(1) : 0};
}

std::tuple<Tensor, Tensor> adaln(const Tensor& x_in, const std::optional<Tensor>& branch_in,
                                 const std::optional<Tensor>& gate_in, const Tensor& shift_in,
                                 const Tensor& scale_in) {
  STD_TORCH_CHECK(x_in.dim() == 3 && branch_in.has_value() == gate_in.has_value(),
                  "adaln: expected x of 3 dimensions, and branch and gate or neither");
  const int64_t dims = shift_in.dim();
  const auto x = rows_of("x", x_in, x_in, 3), branch = rows_of("branch", branch_in, x_in, 3);
  const auto gate = rows_of("gate", gate_in, x_in, dims), shift = rows_of("shift", shift_in, x_in, dims);
  const auto scale = rows_of("scale", scale_in, x_in, dims);
  const std::vector<int64_t> shape{x->size(0), x->size(1), x->size(2)};
  const Tensor h = empty_of(*x, shape, x->scalar_type());
  const Tensor y = branch ? empty_of(*x, shape, x->scalar_type()) : empty_of(*x, {0}, x->scalar_type());
  if (x->numel() == 0) return {y, h};

  for_dtype(x->scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int width = static_cast<int>(shape[2]);
    const bool past = goes_past_caches(*x, branch ? 4 : 2) && starts_line(y) && starts_line(h);
    const Inputs<T> in{shape[1], width, branch.has_value(), dims == 2, past, view_of<T>(x), view_of<T>(branch),
                       view_of<T>(gate), view_of<T>(shift), view_of<T>(scale), {}, {}};
    const Outputs<T> out{mutable_data_of<T>(y), mutable_data_of<T>(h)};
    torch::stable::parallel_for(0, shape[0] * shape[1], 1 + kGrain / width, [&](int64_t first, int64_t last) {
      const Buffer<float> scratch(width);
      run_lanes<ForwardRows<T>>(in, out, scratch.data(), first, last);
      if (past) fence_stores();
    });
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward(
    const std::optional<Tensor>& grad_y_in, const Tensor& grad_h_in, const Tensor& x_in,
    const std::optional<Tensor>& branch_in, const std::optional<Tensor>& gate_in, const Tensor& scale_in) {
  STD_TORCH_CHECK(x_in.dim() == 3 && branch_in.has_value() == gate_in.has_value(),
                  "adaln: expected x of 3 dimensions, and branch and gate or neither");
  const int64_t dims = scale_in.dim();
  const auto grad_y = rows_of("grad_y", grad_y_in, x_in, 3), grad_h = rows_of("grad_h", grad_h_in, x_in, 3);
  const auto x = rows_of("x", x_in, x_in, 3), branch = rows_of("branch", branch_in, x_in, 3);
  const auto gate = rows_of("gate", gate_in, x_in, dims), scale = rows_of("scale", scale_in, x_in, dims);
  const int64_t samples = x->size(0), tokens = x->size(1), width = x->size(2);
  const ScalarType dtype = x->scalar_type();
  const std::vector<int64_t> shape{samples, tokens, width};
  const std::vector<int64_t> rows = dims == 2 ? std::vector<int64_t>{samples, width} : shape;
  const std::vector<int64_t> none{0};
  const Tensor dx = empty_of(*x, shape, dtype), dbranch = empty_of(*x, branch ? shape : none, dtype);
  const Tensor dgate = empty_of(*x, gate ? rows : none, dtype), dshift = empty_of(*x, rows, dtype);
  const Tensor dscale = empty_of(*x, rows, dtype);
  // Without tokens the sums over them are still to be written.
  if (samples * width == 0 || (tokens == 0 && dims == 3)) return {dx, dbranch, dgate, dshift, dscale};

  for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const int n = static_cast<int>(width);
    const bool shared = dims == 2;
    const bool past = goes_past_caches(*x, branch ? 6 : 4) && starts_line(dx) && starts_line(dbranch);
    const Inputs<T> in{tokens, n, branch.has_value(), shared, past, view_of<T>(x), view_of<T>(branch), view_of<T>(gate),
                       {}, view_of<T>(scale), view_of<T>(grad_y), view_of<T>(grad_h)};
    const GradientOutputs<T> out{mutable_data_of<T>(dx), branch ? mutable_data_of<T>(dbranch) : nullptr,
                                 branch ? mutable_data_of<T>(dgate) : nullptr, mutable_data_of<T>(dshift),
                                 mutable_data_of<T>(dscale)};
    const int64_t chunks = std::max<int64_t>(1, (tokens + kChunk - 1) / kChunk);
    const Buffer<float> sums(shared ? samples * chunks * kSums * width : 0);
    const int64_t grain = 1 + kGrain / (width * std::min(kChunk, tokens + 1));
    torch::stable::parallel_for(0, samples * chunks, grain, [&](int64_t first, int64_t last) {
      const Scratch scratch(n);
      for (int64_t job = first; job < last; ++job) {
        const int64_t sample = job / chunks, token = job % chunks * kChunk;
        run_lanes<BackwardRows<T>>(in, out, scratch, sums.data() + job * kSums * width, sample, token,
                                     std::min(token + kChunk, tokens));
      }
      if (past) fence_stores();
    });
    if (!shared) return;
    torch::stable::parallel_for(0, samples, 1 + kGrain / (kSums * width * chunks), [&](int64_t first, int64_t last) {
      for (int64_t sample = first; sample < last; ++sample) {
        run_vectorised<MergeSums>(sums.data() + sample * chunks * kSums * width, chunks, n, out, sample);
      }
    });
  });
  return {dx, dbranch, dgate, dshift, dscale};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  m.impl("adaln", TORCH_BOX(&diffgap::adaln));
  m.impl("adaln_backward", TORCH_BOX(&diffgap::adaln_backward));
}
