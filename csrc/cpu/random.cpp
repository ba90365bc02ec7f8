// diffgap::normal on the CPU; diffgap/ops/random.py has the definition.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

struct NormalArgs {
  TileGrid grid;
  const int64_t* seeds;
  const int64_t* steps;  // or null, then `step` for all
  uint32_t step, stream;
  float* out;
};

struct NormalTiles {
  template <typename Width>
  static DIFFGAP_HD void run(const NormalArgs& a, int64_t first, int64_t last) {
    NoiseBuffer buffer;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t sample = a.grid.sample(tile), begin = a.grid.begin(tile);
      const int n = a.grid.width(begin);
      const uint32_t step = a.steps ? static_cast<uint32_t>(a.steps[sample]) : a.step;
      const NoiseKey key{static_cast<uint64_t>(a.seeds[sample]), step, a.stream};
      const float* drawn = draw_tile<Width::lanes>(key, begin, n, buffer);
      std::memcpy(a.out + sample * a.grid.count + begin, drawn, n * sizeof(float));
    }
  }
};

Tensor normal(const Tensor& seed, int64_t count, const std::optional<Tensor>& steps, int64_t step,
              int64_t stream) {
  const int64_t samples = seed.numel();
  STD_TORCH_CHECK(count >= 0, "count: must not be negative, got ", count);
  const Tensor seeds = index_of("seed", seed, samples);
  const std::optional<Tensor> own = steps ? std::optional(index_of("steps", *steps, samples)) : std::nullopt;
  const Tensor out = empty_of(seed, {samples, count}, ScalarType::Float);
  const NormalArgs args{{samples, count},
                        data_of<int64_t>(seeds),
                        own ? data_of<int64_t>(*own) : nullptr,
                        static_cast<uint32_t>(step),
                        static_cast<uint32_t>(stream),
                        mutable_data_of<float>(out)};
  torch::stable::parallel_for(0, args.grid.size(), kTilesPerThread, [&](int64_t first, int64_t last) {
    run_lanes<NormalTiles>(args, first, last);
  });
  return out;
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("normal", TORCH_BOX(&diffgap::normal)); }
