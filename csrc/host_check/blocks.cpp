#include "host_check/blocks.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

// The bounds of the section that device.h puts shared memory in; absent where no kernel has any.
extern "C" {
extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));
}

namespace host_check {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxGridY = 65535;
constexpr size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  ucontext_t context;
  ThreadPosition position;
  State state;
  Site site;
  uint32_t mask;
  float value;
  int lane_mask;
};

// One mapping for all stacks, each above a page that faults when a stack overflows.
class Stacks {
 public:
  Stacks() {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(of(i), 4096, PROT_NONE);
  }
  char* of(unsigned thread) { return static_cast<char*>(memory_) + thread * kStackBytes; }

 private:
  void* memory_;
};

std::vector<Thread> threads;
Thread* current = nullptr;
ucontext_t scheduler;
sigjmp_buf fault;
const std::function<void()>* body = nullptr;
Launch launch_in_force;
int64_t launch_count = 0;
bool in_reverse = false;
unsigned grid_limit = 0;

std::string describe(const Thread& t) {
  const auto at = [](const dim3& d) { return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ")"; };
  return "thread " + at(t.position.index) + " of block " + at(t.position.block);
}

std::string describe(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void enter() {
  (*body)();
  current->state = State::kDone;
  swapcontext(&current->context, &scheduler);
}

void wait(State state, const Site& site) {
  current->state = state;
  current->site = site;
  swapcontext(&current->context, &scheduler);
}

void on_fault(int signal) { siglongjmp(fault, signal); }

// Turns the signals of bad accesses and of undefined behaviour, which is compiled to a trap, into errors.
class FaultHandlers {
 public:
  FaultHandlers() {
    struct sigaction action{};
    action.sa_handler = on_fault;
    action.sa_flags = SA_NODEFER;
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultHandlers() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr std::array<int, 4> kSignals{SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  std::array<struct sigaction, 4> before_;
};

// This and resume() are not inlined, because functions that return twice may clobber the variables around them.
__attribute__((noinline)) void make_fibre(Thread& t, char* stack) {
  getcontext(&t.context);
  t.context.uc_stack = {stack, 0, kStackBytes};
  t.context.uc_link = nullptr;
  makecontext(&t.context, enter, 0);
  t.state = State::kReady;
}

__attribute__((noinline)) void resume(Thread& t) {
  current = &t;
  if (const int signal = sigsetjmp(fault, 1)) {
    const bool memory = signal == SIGSEGV || signal == SIGBUS;
    throw std::runtime_error(describe(t) + (memory ? ": accesses memory that is not the kernel's"
                                                   : ": has undefined behaviour, such as a misaligned access"));
  }
  swapcontext(&scheduler, &t.context);
}

// Whether the lanes of `first`'s warp that its shuffle names all wait for that shuffle; then they have their values.
bool exchange(unsigned first, unsigned lanes) {
  const Thread& asked = threads[first];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(asked.mask >> lane & 1)) continue;
    if (lane >= lanes) return false;
    const Thread& other = threads[first / kWarp * kWarp + lane];
    const bool there = other.state == State::kAtShuffle && other.site == asked.site && other.mask == asked.mask &&
                       other.lane_mask == asked.lane_mask;
    if (!there) return false;
  }
  if (!(asked.mask >> first % kWarp & 1)) return false;
  std::array<float, kWarp> values{};
  Thread* warp = &threads[first / kWarp * kWarp];
  for (unsigned lane = 0; lane < lanes; ++lane) values[lane] = warp[lane].value;
  const uint32_t mask = asked.mask;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const unsigned from = lane ^ static_cast<unsigned>(warp[lane].lane_mask);
    if (from >= kWarp || !(mask >> from & 1)) {
      throw std::runtime_error(describe(warp[lane]) + ": shuffles with a lane outside its mask at " +
                               describe(warp[lane].site));
    }
    warp[lane].value = values[from];
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (mask >> lane & 1) warp[lane].state = State::kReady;
  }
  return true;
}

// Runs a warp until all of its threads wait for other warps or are done: as far ahead of them as it can be.
void run_warp(unsigned first) {
  const unsigned left = static_cast<unsigned>(threads.size()) - first, lanes = left < kWarp ? left : kWarp;
  bool released = true;
  while (released) {
    for (unsigned i = 0; i < lanes; ++i) {
      Thread& t = threads[first + (in_reverse ? lanes - 1 - i : i)];
      if (t.state == State::kReady) resume(t);
    }
    released = false;
    for (unsigned i = 0; i < lanes; ++i) {
      if (threads[first + i].state == State::kAtShuffle) released |= exchange(first + i, lanes);
    }
  }
}

bool release_barrier() {
  for (const Thread& t : threads) {
    if (t.state != State::kAtBarrier || t.site != threads[0].site) return false;
  }
  for (Thread& t : threads) t.state = State::kReady;
  return true;
}

[[noreturn]] void report_deadlock() {
  for (const Thread& t : threads) {
    if (t.state == State::kDone) continue;
    const char* what = t.state == State::kAtBarrier ? " waits at a barrier that others do not reach, "
                                                    : " waits for a shuffle that lanes of its mask do not reach, ";
    throw std::runtime_error(describe(t) + what + describe(t.site));
  }
  throw std::runtime_error("no thread is left, and none is done");
}

void run_block(const dim3& block, Stacks& stacks) {
  memset(__start_shared_memory, 0xFF, __stop_shared_memory - __start_shared_memory);  // NaN
  const dim3& size = launch_in_force.block;
  for (unsigned i = 0; i < threads.size(); ++i) {
    threads[i].position = {{i % size.x, i / size.x % size.y, i / size.x / size.y}, block};
    make_fibre(threads[i], stacks.of(i));
  }
  const unsigned warps = static_cast<unsigned>((threads.size() + kWarp - 1) / kWarp);
  const auto done = [](const Thread& t) { return t.state == State::kDone; };
  do {
    for (unsigned i = 0; i < warps; ++i) run_warp(kWarp * (in_reverse ? warps - 1 - i : i));
    if (std::all_of(threads.begin(), threads.end(), done)) return;
  } while (release_barrier());
  report_deadlock();
}

}  // namespace

const ThreadPosition& this_thread() { return current->position; }
const Launch& launched() { return launch_in_force; }
Launch last_launch() { return launch_in_force; }
int64_t launches() { return launch_count; }
void set_reversed(bool reversed) { in_reverse = reversed; }
void set_grid_limit(unsigned blocks) { grid_limit = blocks; }
void wait_for_block(const Site& site) { wait(State::kAtBarrier, site); }

float exchange_with(uint32_t mask, float value, int lane_mask, const Site& site) {
  Thread& t = *current;
  t.mask = mask;
  t.value = value;
  t.lane_mask = lane_mask;
  wait(State::kAtShuffle, site);
  return t.value;
}

void run(const Launch& launch, const std::function<void()>& thread) {
  static Stacks stacks;
  const size_t count = static_cast<size_t>(launch.block.x) * launch.block.y * launch.block.z;
  const auto fits = [](unsigned blocks, unsigned most) { return blocks >= 1 && blocks <= most; };
  const bool grid_fits = fits(launch.grid.x, INT32_MAX) && fits(launch.grid.y, kMaxGridY) && launch.grid.z == 1;
  if (count < 1 || count > kMaxThreads || !grid_fits) throw std::runtime_error("a launch that CUDA would refuse");
  launch_in_force = launch;
  if (grid_limit > 0 && launch.grid.y > grid_limit) launch_in_force.grid.y = grid_limit;
  ++launch_count;
  body = &thread;
  threads.resize(count);
  const FaultHandlers handlers;
  for (unsigned y = 0; y < launch_in_force.grid.y; ++y) {
    for (unsigned x = 0; x < launch_in_force.grid.x; ++x) run_block({x, y, 0}, stacks);
  }
}

}  // namespace host_check
