// Fibers: stacks on which code can stop and go on later. One host thread at a time uses them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_UCONTEXT
#endif
#ifdef CUDA_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_host {

class Fiber {
 public:
  Fiber() = default;                // the caller's own stack
  explicit Fiber(void (*entry)());  // a new stack, on which entry() begins at the first switch; it never returns
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Stops here, on `from`, until somebody switches back to it.
  static void switch_to(Fiber& from, Fiber& to);

 private:
  static void begin();
  void arrive();

#ifdef CUDA_HOST_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void (*entry_)() = nullptr;
  // What AddressSanitizer must know of a stack. Those of a host thread are learnt when it is left.
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace cuda_host
