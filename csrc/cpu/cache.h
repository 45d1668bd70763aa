// The CPU's data caches.
#pragma once

#include <cstdint>

namespace se_ext {

// In bytes, of CPU 0; what the schedule assumes where Linux is silent. Declared for Python in info.h too.
std::int64_t cache_bytes(int level);

}  // namespace se_ext
