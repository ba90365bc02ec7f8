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
  bool past;           // whether results of the shape of x, float32 then, go past the caches
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

// float32 rows of one thread, for what is not read or written in place.
class Scratch {
 public:
  enum Row { kX, kBranch, kGate, kShift, kScale, kGradY, kGradH, kDGate, kDShift, kDScale, kRows };

  explicit Scratch(int width) : stride_(round_up(width, kAligned) + kApart), memory_(kRows * stride_) {}
  float* operator[](Row row) const { return memory_.data() + row * stride_; }

 private:
  static constexpr int64_t kAligned = 16;
  // Rows a multiple of 4 KiB apart would share the lines of the first-level cache, and stores to one hold up loads of
  // another.
  static constexpr int64_t kApart = 5 * kAligned;
  int64_t stride_;
  Buffer<float> memory_;
};

template <typename T>
struct ForwardRows {
  template <typename Width>
  static DIFFGAP_HD void run(const Inputs<T>& in, const Outputs<T>& out, const Scratch& s, int64_t first,
                             int64_t last) {
    constexpr int lanes = Width::lanes;
    const int n = in.width;
    const float *gate = nullptr, *shift = nullptr, *scale = nullptr;
    for (int64_t row = first; row < last; ++row) {
      const int64_t sample = row / in.tokens, token = row % in.tokens, at = row * n;
      if (row == first || token == 0 || !in.shared) {
        if (in.gated) gate = load_tile(in.gate.at(sample, token), n, s[Scratch::kGate]);
        shift = load_tile(in.shift.at(sample, token), n, s[Scratch::kShift]);
        scale = load_tile(in.scale.at(sample, token), n, s[Scratch::kScale]);
      }
      const float* y = load_tile(in.x.at(sample, token), n, s[Scratch::kX]);
      float sum, moments[Moments::sums];
      if (in.gated) {
        const float* branch = load_tile(in.branch.at(sample, token), n, s[Scratch::kBranch]);
        if (in.past) {
          float* target = s[Scratch::kX];
          reduce<lanes>(AddBranch<true>{y, branch, gate, target, open_tile(out.y + at, nullptr)}, n, &sum);
          y = target;
        } else {
          float* target = open_tile(out.y + at, s[Scratch::kX]);
          reduce<lanes>(AddBranch<>{y, branch, gate, target}, n, &sum);
          close_tile(out.y + at, n, target);
          y = target;
        }
      } else {
        reduce<lanes>(Sum{y}, n, &sum);
      }
      const float mean = sum / n;
      reduce<lanes>(Moments{y, mean}, n, moments);
      float* h = open_tile(out.h + at, s[Scratch::kBranch]);
      const Norm norm = Norm::of(mean, moments, n);
      in.past ? for_each<lanes>(Modulate<true>{y, shift, scale, norm, h}, n)
              : for_each<lanes>(Modulate<false>{y, shift, scale, norm, h}, n);
      close_tile(out.h + at, n, h);
    }
  }
};

// The gradients of tokens `token` to `end` of a sample. Of modulation that they share, `sums` (kSums, width) gets the
// gradients' sums in float32: gate, shift, scale.
template <typename T>
struct BackwardRows {
  template <typename Width>
  static DIFFGAP_HD void run(const Inputs<T>& in, const GradientOutputs<T>& out, const Scratch& s, float* sums,
                             int64_t sample, int64_t token, int64_t end) {
    constexpr int lanes = Width::lanes;
    const int n = in.width;
    GradientRow row{};
    row.grad_y = s[Scratch::kGradY];
    if (!in.grad_y.data) std::fill_n(s[Scratch::kGradY], n, 0.0f);
    if (in.shared) {
      row.dgate = sums, row.dshift = sums + n, row.dscale = sums + 2 * n;
      std::fill_n(sums, kSums * n, 0.0f);
    }
    for (bool first = true; token < end; ++token, first = false) {
      const int64_t at = (sample * in.tokens + token) * n;
      if (first || !in.shared) {
        if (in.gated) row.gate = load_tile(in.gate.at(sample, token), n, s[Scratch::kGate]);
        row.scale = load_tile(in.scale.at(sample, token), n, s[Scratch::kScale]);
      }
      row.y = load_tile(in.x.at(sample, token), n, s[Scratch::kX]);
      row.dx = open_tile(out.dx + at, s[Scratch::kX]);
      float sum, moments[GradientMoments::sums];
      if (in.gated) {
        row.branch = load_tile(in.branch.at(sample, token), n, s[Scratch::kBranch]);
        row.dbranch = open_tile(out.dbranch + at, s[Scratch::kBranch]);
        // y waits where dx will stand: a row less in the first-level cache, which the streams nearly fill.
        float* y = in.past ? s[Scratch::kX] : row.dx;
        reduce<lanes>(AddBranch<>{row.y, row.branch, row.gate, y}, n, &sum);
        row.y = y;
      } else {
        reduce<lanes>(Sum{row.y}, n, &sum);
      }
      row.grad_h = load_tile(in.grad_h.at(sample, token), n, s[Scratch::kGradH]);
      if (in.grad_y.data) row.grad_y = load_tile(in.grad_y.at(sample, token), n, s[Scratch::kGradY]);
      reduce<lanes>(GradientMoments{row.y, row.grad_h, row.scale, sum / n}, n, moments);
      row.norm = Norm::of(sum / n, moments, n);
      row.mean_a = moments[2] / n;
      row.mean_a_normed = (moments[3] * row.norm.rstd - moments[2] * row.norm.offset) / n;

      if (!in.shared) {
        if (in.gated) row.dgate = open_tile(out.dgate + at, s[Scratch::kDGate]);
        row.dshift = open_tile(out.dshift + at, s[Scratch::kDShift]);
        row.dscale = open_tile(out.dscale + at, s[Scratch::kDScale]);
      }
      in.past ? write_gradients<lanes, true>(row, in.gated, in.shared, n)
              : write_gradients<lanes, false>(row, in.gated, in.shared, n);
      close_tile(out.dx + at, n, row.dx);
      if (in.gated) close_tile(out.dbranch + at, n, row.dbranch);
      if (!in.shared) {
        if (in.gated) close_tile(out.dgate + at, n, row.dgate);
        close_tile(out.dshift + at, n, row.dshift);
        close_tile(out.dscale + at, n, row.dscale);
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
        close_tile(target, n, total);
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
  const bool dense = rows->size(dims - 1) == 1 || rows->stride(dims - 1) == 1;
  return dense ? *rows : torch::stable::contiguous(*rows);
}

// Whether results go past the caches, given how many tensors of x's shape the call moves.
bool goes_past_caches(const Tensor& x, int64_t tensors) {
  return x.scalar_type() == ScalarType::Float && x.size(2) * sizeof(float) % kLine == 0 &&
         x.numel() * static_cast<int64_t>(sizeof(float)) * tensors > kCacheBytes;
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
      run_lanes<ForwardRows<T>>(in, out, Scratch(width), first, last);
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
