// How threads are arranged over samples, and kernels launched.
#pragma once

#include <initializer_list>

#include "cuda/unit.cuh"

namespace diffgap {

// Threads of a block, few, so that small batches have many blocks; of a team at least; teams of a block at most.
constexpr int kThreads = 128, kMinWidth = 8, kMaxTeams = kThreads / kMinWidth;
constexpr int kMaxGridY = 65535;  // CUDA's limit

// A team of threads, all of one threadIdx.y, works on one sample or row, together with its namesakes along blockIdx.y.
struct Layout {
  dim3 grid, block;
};

// A team's threads in one block, `threads` at most, for as even a share of the units in each of its blocks as there is:
// whole warps, or a power of two, which reductions can halve.
inline unsigned team_width(int64_t units, int threads) {
  const int64_t blocks = (units + threads - 1) / threads, share = (units + blocks - 1) / blocks;
  if (share > 32) return static_cast<unsigned>((share + 31) / 32 * 32);
  unsigned width = kMinWidth;
  while (width < share) width *= 2;
  return width;
}

inline Layout team_layout(int64_t teams, unsigned width, int64_t blocks_per_team, int threads) {
  unsigned per_block = static_cast<unsigned>(threads) / width;
  per_block = per_block < 1 ? 1 : per_block > kMaxTeams ? kMaxTeams : per_block;
  const int64_t along_y = blocks_per_team < kMaxGridY ? blocks_per_team : kMaxGridY;
  return {dim3(static_cast<unsigned>((teams + per_block - 1) / per_block), static_cast<unsigned>(along_y)),
          dim3(width, per_block)};
}

// One thread for every unit of every sample.
template <typename T>
Layout layout(int64_t samples, int64_t count, int threads) {
  const int64_t units = Span<T>::of_sample(0, count).end_unit();
  const unsigned width = team_width(units, threads);
  return team_layout(samples, width, (units + width - 1) / width, threads);
}

DIFFGAP_DEVICE int64_t team_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// Calls body(unit, place) for the units of `span` that are this thread's. The loop has more than one turn only in a
// grid that is as large as it can be.
template <typename T, typename Body>
DIFFGAP_DEVICE void for_units(const Span<T>& span, const Body& body) {
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
  int64_t unit = span.first_unit() + static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  for (; unit < span.end_unit(); unit += stride) body(unit, span.place(unit));
}

// Whether all units are whole and all pointers, of which some may be null, at multiples of 16 bytes.
template <typename T>
bool whole_units(int64_t count, std::initializer_list<const T*> pointers) {
  bool whole = count % kUnit<T> == 0;
  for (const T* pointer : pointers) whole = whole && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return whole;
}

template <typename Args>
void launch(void (*kernel)(Args), const Layout& layout, void* stream, const Args& args) {
#if defined(__CUDACC__)
  kernel<<<layout.grid, layout.block, 0, static_cast<cudaStream_t>(stream)>>>(args);
#else
  host_check::run({layout.grid, layout.block}, [&] { kernel(args); });
  (void)stream;
#endif
}

}  // namespace diffgap
