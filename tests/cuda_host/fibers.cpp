#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#ifdef CUDA_HOST_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {
namespace {

constexpr std::size_t kStack = 128 << 10;
constexpr std::size_t kGuard = 4 << 10;  // below the stack, so that an overflow ends the process

Fiber* left = nullptr;     // of the switch under way
Fiber* entered = nullptr;  // likewise

}  // namespace

#ifndef CUDA_HOST_UCONTEXT

// cuda_host_switch(void** from, void* to): keeps what a callee must keep on the stack, and the stack in *from.
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, . - cuda_host_switch
)");
extern "C" void cuda_host_switch(void** from, void* to);

#endif

Fiber::Fiber(void (*entry)()) : entry_(entry), size_(kStack) {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    perror("cuda_host: no memory for a stack");
    abort();
  }
  char* bottom = static_cast<char*>(memory) + kGuard;
  bottom_ = bottom;
#ifdef CUDA_HOST_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = bottom;
  context_.uc_stack.ss_size = kStack;
  makecontext(&context_, begin, 0);
#else
  // Six registers, the address to return to, and begin()'s own return address: none, so that a backtrace ends there.
  void** top = reinterpret_cast<void**>(bottom + kStack) - 1;  // as a call leaves it, 8 below a multiple of 16
  top[-1] = reinterpret_cast<void*>(begin);
  stack_pointer_ = top - 7;
#endif
}

void Fiber::begin() {
  Fiber& self = *entered;
  self.arrive();
  self.entry_();
  abort();
}

void Fiber::arrive() {
#ifdef CUDA_HOST_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  left = &from;
  entered = &to;
#ifdef CUDA_HOST_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#ifdef CUDA_HOST_UCONTEXT
  swapcontext(&from.context_, &to.context_);
#else
  cuda_host_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
  from.arrive();
}

}  // namespace cuda_host
