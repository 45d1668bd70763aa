// What the sanitizers must find: mistakes on purpose, in the library's own code. sanitize.py calls them to see that a
// run without findings means something.
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/tiling.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A kernel writes one element past `count` values.
EXPORTED void se_ext_write_past(float* values, std::int64_t count) {
  se_ext::cpu::kernels().vector_float.divide(count + 1, 2, values);
}

// Their sum passes the largest integer.
EXPORTED std::int64_t se_ext_overflow(std::int64_t count) {
  return se_ext::cpu::ceil_div(count, count);
}
