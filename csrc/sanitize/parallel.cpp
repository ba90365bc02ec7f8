// Tells ThreadSanitizer what OpenMP's runtime, which is not compiled with it, guarantees: all that comes before a
// parallel region happens before its body, and the body before all that comes after it. Without this every result of
// a parallel loop looks like a race. Loaded before libgomp (scripts/sanitize.py).
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

namespace {

using Body = void (*)(void*);

struct Region {
  Body body;
  void* data;
  char begun, ended;  // only their addresses matter
};

void run(void* argument) {
  Region& region = *static_cast<Region*>(argument);
  __tsan_acquire(&region.begun);
  region.body(region.data);
  __tsan_release(&region.ended);
}

}  // namespace

// libgomp's entry of `#pragma omp parallel`, through which at::parallel_for goes.
extern "C" __attribute__((visibility("default"))) void GOMP_parallel(Body body, void* data, unsigned threads,
                                                                     unsigned flags) {
  using Original = void (*)(Body, void*, unsigned, unsigned);
  static const auto original = reinterpret_cast<Original>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data, 0, 0};
  __tsan_release(&region.begun);
  original(run, &region, threads, flags);
  __tsan_acquire(&region.ended);
}
