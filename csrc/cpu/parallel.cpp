#include "parallel.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "../info.h"

#ifndef _OPENMP
#error "se_ext's CPU kernels need -fopenmp: without it they would silently run on one thread"
#endif

namespace se_ext::cpu {
namespace {

// Waking a second thread costs a few microseconds, in which one core moves about this much.
constexpr std::int64_t kBytesPerThread = 64 * 1024;

std::atomic<bool> in_forked_child{false};

const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace

int threads_for(std::int64_t bytes) {
  const std::int64_t wanted = bytes / kBytesPerThread;
  if (wanted <= 1 || at::in_parallel_region() || in_forked_child.load(std::memory_order_relaxed)) return 1;
  return static_cast<int>(std::min<std::int64_t>(wanted, at::get_num_threads()));
}

}  // namespace se_ext::cpu

namespace se_ext {

int num_threads() {
  return at::get_num_threads();
}

std::string openmp_runtime() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) ? info.dli_fname : "unknown";
}

}  // namespace se_ext
