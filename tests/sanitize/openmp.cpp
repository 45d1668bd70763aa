// The OpenMP runtime of se_ext's parallel regions, on threads of its own. ThreadSanitizer does not see how the threads
// of GCC's runtime wait for each other, and would take every barrier for none. It sees all of what is used here.
//
// The code that is tested is compiled with -fopenmp as ever, and calls these functions by GCC's names. They are hidden,
// so that torch keeps its own runtime.
#include "openmp.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace openmp {

std::atomic<int> teams{0};
bool barriers_are_left_out = false;

namespace {

struct Region {
  explicit Region(int threads) : size(threads) {}

  void barrier() {
    std::unique_lock lock(mutex);
    const int mine = round;
    if (++arrived == size) {
      arrived = 0;
      ++round;
      all_arrived.notify_all();
    } else {
      all_arrived.wait(lock, [&] { return round != mine; });
    }
  }

  const int size;

 private:
  std::mutex mutex;
  std::condition_variable all_arrived;
  int arrived = 0;
  int round = 0;
};

// Where this thread is.
thread_local Region* region = nullptr;
thread_local int rank = 0;

}  // namespace
}  // namespace openmp

extern "C" {

int omp_get_thread_num() {
  return openmp::rank;
}

int omp_get_num_threads() {
  return openmp::region ? openmp::region->size : 1;
}

int omp_get_max_threads() {  // parallel.cpp takes its address
  return omp_get_num_threads();
}

void GOMP_barrier() {
  if (openmp::region && !openmp::barriers_are_left_out) openmp::region->barrier();
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  openmp::Region region(static_cast<int>(threads));
  openmp::teams.fetch_add(1, std::memory_order_relaxed);  // relaxed: orders nothing between host threads
  const auto run = [&](int rank) {
    openmp::region = &region;
    openmp::rank = rank;
    body(data);
    openmp::region = nullptr;
    openmp::rank = 0;
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < region.size; ++rank) others.emplace_back(run, rank);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // extern "C"
