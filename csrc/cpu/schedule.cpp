#include "schedule.h"

#include <fstream>
#include <string>

namespace se_ext::cpu {
namespace {

constexpr std::int64_t kSamplesAtOnce = 4;  // samples that the excitation's kernels take per weight they load

// The data cache of this level as the first CPU sees it, in bytes; `otherwise` where Linux does not tell. Not from
// sysconf: on AMD's CPUs it adds up the last caches of the whole chip, of which a core can use one.
std::int64_t cache_bytes(int level, std::int64_t otherwise) {
  for (int index = 0; index < 8; ++index) {
    const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const auto read = [&](const char* name, auto& value) { return bool(std::ifstream(cache + name) >> value); };
    int found = 0;
    std::string type;
    std::int64_t kilobytes = 0;  // "512K"
    if (!read("level", found)) break;
    if (found == level && read("type", type) && type != "Instruction" && read("size", kilobytes))
      return kilobytes << 10;
  }
  return otherwise;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

Schedule Schedule::of(const FeatureMap& map, int maps, std::int64_t weight_bytes) {
  static const std::int64_t l2_bytes = cache_bytes(2, 1 << 20);
  static const std::int64_t l3_bytes = cache_bytes(3, 16 << 20);
  Schedule s;
  const std::int64_t slab_bytes = std::max<std::int64_t>(1, map.slab_bytes());
  s.threads = threads_for(map.samples * slab_bytes * maps + weight_bytes);
  s.streaming = map.samples * slab_bytes * maps > l3_bytes;
  s.by_sample = map.samples % s.threads == 0 || map.samples >= 4 * s.threads;
  const std::int64_t teams = s.teams();

  // As many samples as this team's second-level caches hold; and where rereading the weights for every block would
  // cost more than an eighth of the samples' own traffic, as many as make it less, within half of the third level.
  const std::int64_t in_l2 = l2_bytes * 3 / 4 * (s.threads / teams) / (slab_bytes * maps);
  const std::int64_t in_l3 = l3_bytes / 2 / teams / (slab_bytes * maps);
  std::int64_t amortising = ceil_div(8 * weight_bytes, slab_bytes * maps);
  if (amortising > 1) amortising = ceil_div(amortising, kSamplesAtOnce) * kSamplesAtOnce;
  const std::int64_t block = std::max(in_l2, std::min(amortising, in_l3));
  s.block = std::clamp<std::int64_t>(block, 1, std::max<std::int64_t>(1, map.samples));
  return s;
}

}  // namespace se_ext::cpu
