// Preloaded into a process: each tensor of torch's CPU allocator lies on pages of its own between two that may not be
// touched, its end at the second one (GUARD=end) or its begin at the first (GUARD=begin). What is freed may not be
// touched again. Allocations that are not aligned as torch aligns its tensors are left alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kTorchAlignment = 64 };
static const size_t kArena = (size_t)1 << 42;  // addresses, none of which is used twice

static char* arena;
static atomic_size_t used;
static int at_the_end;
static void (*real_free)(void*);
static int (*real_memalign)(void**, size_t, size_t);

static void start(void) {
  real_memalign = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  real_free = (void (*)(void*))dlsym(RTLD_NEXT, "free");
}

__attribute__((constructor)) static void reserve(void) {
  start();
  const char* guard = getenv("GUARD");
  at_the_end = guard && strcmp(guard, "end") == 0;
  void* memory = mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  arena = memory;
}

// The page in front of a tensor says how large it is; it may be read while the tensor is made or freed alone.
int posix_memalign(void** to, size_t alignment, size_t bytes) {
  if (!real_memalign) start();
  if (!arena || alignment != kTorchAlignment || bytes == 0) return real_memalign(to, alignment, bytes);
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  if (whole < bytes || whole > kArena / 1024) return ENOMEM;
  const size_t at = atomic_fetch_add(&used, whole + 2 * kPage);
  if (at + whole + 2 * kPage > kArena) return ENOMEM;
  char* front = arena + at;
  if (mprotect(front, kPage + whole, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
  *(size_t*)front = whole;
  if (mprotect(front, kPage, PROT_NONE) != 0) return ENOMEM;
  *to = front + kPage + (at_the_end ? whole - bytes : 0);
  return 0;
}

void free(void* p) {
  if (!real_free) start();
  if (!arena || (char*)p < arena || (char*)p >= arena + kArena) {
    real_free(p);
    return;
  }
  const int error = errno;
  char* tensor = (char*)((uintptr_t)p / kPage * kPage);
  // Torch frees what posix_memalign gave, which lies in the tensor's first page.
  char* front = tensor - kPage;
  mprotect(front, kPage, PROT_READ | PROT_WRITE);
  const size_t whole = *(size_t*)front;
  mmap(front, kPage + whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  errno = error;
}
