// Scratch memory for one call: the small [N, C] and [N, M] vectors and partial sums that nobody keeps. It comes from a
// buffer that the calling thread keeps, which saves a handful of allocations per call.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../feature_map.h"

namespace se_ext::cpu {

class Scratch {
 public:
  // Room for `items` values of the type, taken piece by piece.
  Scratch(std::int64_t items, int pieces, const at::TensorOptions& options);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `items` values, aligned to a cache line, uninitialised.
  Pointer take(std::int64_t items);

 private:
  at::Tensor memory_;  // the thread's buffer, or one of our own where that is too small for what is asked
  Pointer next_;
  bool borrowed_;
};

}  // namespace se_ext::cpu
