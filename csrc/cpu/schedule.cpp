#include "schedule.h"

#include "cache.h"

namespace se_ext::cpu {

Schedule Schedule::of(std::int64_t samples, std::int64_t bytes) {
  Schedule s;
  s.threads = threads_for(bytes);
  s.by_sample = samples % s.threads == 0 || samples >= 4 * s.threads;
  s.chunk = std::max<std::int64_t>(1, samples);
  s.streaming = false;
  return s;
}

Schedule Schedule::of(const FeatureMap& map, int maps, std::int64_t weight_bytes) {
  static const std::int64_t l2_bytes = cache_bytes(2);
  static const std::int64_t l3_bytes = cache_bytes(3);
  const std::int64_t slab_bytes = std::max<std::int64_t>(1, map.slab_bytes());
  Schedule s = of(map.samples, map.samples * slab_bytes * maps + weight_bytes);
  s.streaming = map.samples * slab_bytes * maps > l3_bytes;
  const std::int64_t teams = s.teams();

  // As many samples as this team's second-level caches hold; and where rereading the weights for every chunk would
  // cost more than an eighth of the samples' own traffic, as many as make it less, within half of the third level.
  const std::int64_t in_l2 = l2_bytes * 3 / 4 * (s.threads / teams) / (slab_bytes * maps);
  const std::int64_t in_l3 = l3_bytes / 2 / teams / (slab_bytes * maps);
  std::int64_t amortising = ceil_div(8 * weight_bytes, slab_bytes * maps);
  if (amortising > 1) amortising = ceil_div(amortising, kSamplesAtOnce) * kSamplesAtOnce;
  const std::int64_t chunk = std::max(in_l2, std::min(amortising, in_l3));
  s.chunk = std::clamp<std::int64_t>(chunk, 1, s.chunk);
  return s;
}

}  // namespace se_ext::cpu
