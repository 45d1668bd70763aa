#include "schedule.h"

#include <unistd.h>

namespace se_ext::cpu {
namespace {

std::int64_t l2_bytes() {
  static const std::int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return static_cast<std::int64_t>(found);
#endif
    return std::int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace

Schedule Schedule::of(const FeatureMap& map, int maps, std::int64_t weight_bytes) {
  Schedule s;
  const std::int64_t slab_bytes = std::max<std::int64_t>(1, map.slab_bytes());
  s.threads = threads_for(map.samples * slab_bytes * maps + weight_bytes);
  s.by_sample = map.samples % s.threads == 0 || map.samples >= 4 * s.threads;
  const std::int64_t cache = l2_bytes() * 3 / 4 * (s.by_sample ? 1 : s.threads);
  // As many samples as the cache holds, and enough that rereading the weights costs no more than reading the samples.
  const std::int64_t fitting = cache / (slab_bytes * maps);
  const std::int64_t amortising = (weight_bytes + slab_bytes - 1) / slab_bytes;
  s.block = std::clamp<std::int64_t>(std::max(fitting, amortising), 1, std::max<std::int64_t>(1, map.samples));
  return s;
}

}  // namespace se_ext::cpu
