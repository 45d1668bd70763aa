// One parallel region on torch's own thread pool, for work that needs barriers inside it (at::parallel_for has none).
#pragma once

#include <omp.h>

#include <cstdint>
#include <utility>

namespace se_ext::cpu {

// The threads that work together on one thing. A team of one has nothing to wait for.
struct Team {
  int rank = 0;
  int size = 1;

  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }

  // This thread's part of [0, count), the same whenever the team is the same.
  std::pair<std::int64_t, std::int64_t> share(std::int64_t count) const {
    return {count * rank / size, count * (rank + 1) / size};
  }
};

// How many threads are worth waking for `bytes` of traffic: at most torch.get_num_threads(); one inside another
// parallel region, and one in a forked child, whose OpenMP pool did not survive the fork.
int threads_for(std::int64_t bytes);

template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    f(Team{});
    return;
  }
#pragma omp parallel num_threads(threads)
  f(Team{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace se_ext::cpu
