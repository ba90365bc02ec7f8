// Runs a CUDA kernel's threads on the host, block by block: each thread is a fibre that runs until it has to wait for
// others. What a GPU leaves undefined is an error here: a barrier that not all threads of a block reach, or reach at
// different places; a shuffle whose lanes are not all there; an access to memory that is not the kernel's. Shared
// memory holds NaN before it is written.
#pragma once

#include <cstdint>
#include <functional>

namespace host_check {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Where in the source a thread waits.
struct Site {
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();

  bool operator==(const Site&) const = default;
};

struct Launch {
  dim3 grid, block;
};

struct ThreadPosition {
  dim3 index, block;
};

// Of the thread that is running.
const ThreadPosition& this_thread();
const Launch& launched();
void wait_for_block(const Site& site);
float exchange_with(uint32_t mask, float value, int lane_mask, const Site& site);

// Warps, and threads of a warp, run in the order of their numbers, or in reverse: a missing barrier shows in one of the
// two, because the warp that runs is as far ahead of the next as it can be.
void set_reversed(bool reversed);

// Blocks along y at most; 0 for as many as are launched. Kernels that stride over gridDim.y do the same work in fewer.
void set_grid_limit(unsigned blocks);

// Throws std::runtime_error for the errors above.
void run(const Launch& launch, const std::function<void()>& thread);

// For tests of how kernels are launched.
Launch last_launch();
int64_t launches();

}  // namespace host_check
