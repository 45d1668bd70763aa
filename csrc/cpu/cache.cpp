#include "cache.h"

#include <fstream>

#include "../info.h"

namespace se_ext {

// From sysfs, not from sysconf: on AMD's CPUs sysconf adds up the last caches of the whole chip, of which a core can
// use one.
std::int64_t cache_bytes(int level) {
  for (int index = 0; index < 8; ++index) {
    const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const auto read = [&](const char* name, auto& value) { return bool(std::ifstream(cache + name) >> value); };
    int found = 0;
    std::string type;
    std::int64_t kilobytes = 0;  // "512K"
    if (!read("level", found)) break;
    if (found == level && read("type", type) && type != "Instruction" && read("size", kilobytes)) {
      return kilobytes << 10;
    }
  }
  return std::int64_t{level == 2 ? 1 : 16} << 20;
}

}  // namespace se_ext
