#include "scratch.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace se_ext::cpu {
namespace {

constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kKeptBytes = std::int64_t{8} << 20;  // at most this much stays with a thread

struct ThreadBuffer {
  at::Tensor bytes;
  bool in_use = false;
};

ThreadBuffer& thread_buffer() {
  static thread_local ThreadBuffer buffer;
  return buffer;
}

}  // namespace

Scratch::Scratch(std::int64_t items, int pieces, const at::TensorOptions& options) : borrowed_(false) {
  const auto item_bytes = static_cast<std::int64_t>(options.dtype().itemsize());
  const std::int64_t bytes = items * item_bytes + pieces * kLineBytes;
  ThreadBuffer& own = thread_buffer();
  if (bytes <= kKeptBytes && !own.in_use) {
    if (!own.bytes.defined() || own.bytes.numel() < bytes) {
      own.bytes = at::empty({std::max(bytes, std::int64_t{64} << 10)}, at::TensorOptions(at::kByte));
    }
    own.in_use = borrowed_ = true;
    memory_ = own.bytes;
  } else {
    memory_ = at::empty({bytes}, at::TensorOptions(at::kByte));
  }
  next_ = Pointer(memory_);
  next_.item_bytes = item_bytes;
}

Scratch::~Scratch() {
  if (borrowed_) thread_buffer().in_use = false;
}

Pointer Scratch::take(std::int64_t items) {
  const Pointer taken = next_;
  const std::int64_t bytes = items * next_.item_bytes;
  next_.base += (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  return taken;
}

}  // namespace se_ext::cpu
