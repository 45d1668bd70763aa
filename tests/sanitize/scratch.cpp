// Scratch memory in the place of csrc/cpu/scratch.cpp: fresh at each call, and nothing of it may be touched but the
// pieces that were taken. In the buffer that a thread keeps, an access past a piece would meet the next piece, or what
// an earlier call left.
#include "../../csrc/cpu/scratch.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <sanitizer/asan_interface.h>

namespace se_ext::cpu {
namespace {

constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kBetween = 64;  // bytes behind each piece

}  // namespace

Scratch::Scratch(std::int64_t items, int pieces, const at::TensorOptions& options) : borrowed_(false) {
  const auto item_bytes = static_cast<std::int64_t>(options.dtype().itemsize());
  const std::int64_t bytes = items * item_bytes + pieces * (kLineBytes + kBetween);
  memory_ = at::empty({bytes}, at::TensorOptions(at::kByte));
  next_ = Pointer(memory_);
  next_.item_bytes = item_bytes;
  ASAN_POISON_MEMORY_REGION(memory_.data_ptr(), memory_.nbytes());
}

Scratch::~Scratch() {
  ASAN_UNPOISON_MEMORY_REGION(memory_.data_ptr(), memory_.nbytes());
}

Pointer Scratch::take(std::int64_t items) {
  const Pointer taken = next_;
  const std::int64_t bytes = items * next_.item_bytes;
  next_.base += (bytes + kLineBytes - 1) / kLineBytes * kLineBytes + kBetween;
  TORCH_CHECK(next_.base <= static_cast<char*>(memory_.data_ptr()) + memory_.nbytes(),
              "scratch memory: more is taken than was asked for");
  ASAN_UNPOISON_MEMORY_REGION(taken.base, bytes);
  return taken;
}

}  // namespace se_ext::cpu
