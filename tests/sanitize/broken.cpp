// What the sanitizers must find: mistakes on purpose, in the library's own code. sanitize.py calls them to see that a
// run without findings means something.
#include <c10/core/TensorOptions.h>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/scratch.h"
#include "../../csrc/cpu/tiling.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A kernel writes `more` values than the `count` that there are.
EXPORTED void se_ext_write_past(float* values, std::int64_t count, std::int64_t more) {
  se_ext::cpu::kernels().vector_float.divide(count + more, 2, values);
}

// The same at the end of a piece of scratch memory, which another piece follows.
EXPORTED void se_ext_write_past_scratch(std::int64_t count, std::int64_t more) {
  se_ext::cpu::Scratch scratch(2 * count, 2, at::TensorOptions(at::kFloat));
  const se_ext::Pointer first = scratch.take(count);
  scratch.take(count);
  se_ext::cpu::kernels().vector_float.divide(count + more, 2, first.base);
}

// Their sum passes the largest integer.
EXPORTED std::int64_t se_ext_overflow(std::int64_t count) {
  return se_ext::cpu::ceil_div(count, count);
}
