// Preloaded into a process: makes one allocation fail among those that a thread makes while libse_ext is at work, which
// is while a function of it is on the stack; or that one and all memory of tensors from there on. The allocations of
// Python and of the dispatcher in front of the op are left alone, and so are those of the threads that an op wakes.
//
// Not all allocations from one on fail: torch itself does not survive that. While an exception unwinds, it destroys
// nodes of autograd's graph, which allocates (torch::autograd::Node::release_resources), and ends the process if it
// cannot.
//
// Also counts the blocks that the process holds, and the allocations inside OpenMP's parallel regions, where a failure
// could not be reported: an exception that leaves a region ends the process.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

enum { kTorchAlignment = 64, kMostFrames = 128, kMostAllocations = 1 << 16 };
enum mode { kOff, kList, kFail };

static __thread enum mode mode;
static __thread int is_looking;  // the search for the caller may allocate
static __thread long at;         // allocations since the thread was marked
static __thread long first;
static __thread int tensors_fail;  // from there on
static __thread long failures;
static __thread unsigned char is_ours[kMostAllocations];

static atomic_long blocks;
static atomic_int is_watched;
static atomic_long in_regions;
static int (*in_parallel)(void);
static int prints;
static uintptr_t begin, end;  // of libse_ext's code

static int find_code(struct dl_phdr_info* library, size_t size, void* nothing) {
  (void)size, (void)nothing;
  if (!strstr(library->dlpi_name, "libse_ext")) return 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr)* part = &library->dlpi_phdr[i];
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    begin = library->dlpi_addr + part->p_vaddr;
    end = begin + part->p_memsz;
  }
  return 1;
}

// Whether a function of libse_ext is on the stack.
static int called_by_us(void) {
  void* frames[kMostFrames];
  const int count = backtrace(frames, kMostFrames);
  for (int i = 0; i < count; ++i) {
    if ((uintptr_t)frames[i] >= begin && (uintptr_t)frames[i] < end) {
      return 1;
    }
  }
  return 0;
}

// Whether this allocation is to fail.
static int fails(int is_tensor) {
  if (is_looking) return 0;
  if (atomic_load_explicit(&is_watched, memory_order_relaxed)) {
    is_looking = 1;
    if (in_parallel && in_parallel()) {
      atomic_fetch_add(&in_regions, 1);
      if (prints) {
        void* frames[kMostFrames];
        backtrace_symbols_fd(frames, backtrace(frames, kMostFrames), 2);
        fputs("---- in region\n", stderr);
      }
    }
    is_looking = 0;
  }
  if (mode == kOff) return 0;
  const long i = at++;
  int failed = 0;
  is_looking = 1;
  if (mode == kList) {
    if (i < kMostAllocations) is_ours[i] = called_by_us();
  } else if ((i == first || (i > first && tensors_fail && is_tensor)) && called_by_us()) {
    failed = 1;
    ++failures;
    if (prints) {
      void* frames[kMostFrames];
      backtrace_symbols_fd(frames, backtrace(frames, kMostFrames), 2);
      fputs("----\n", stderr);
    }
  }
  is_looking = 0;
  if (failed) errno = ENOMEM;
  return failed;
}

static void* counted(void* block) {
  if (block) atomic_fetch_add_explicit(&blocks, 1, memory_order_relaxed);
  return block;
}

void* malloc(size_t bytes) {
  return fails(0) ? NULL : counted(__libc_malloc(bytes));
}
void* calloc(size_t items, size_t bytes) {
  return fails(0) ? NULL : counted(__libc_calloc(items, bytes));
}
void* realloc(void* block, size_t bytes) {
  if (fails(0)) return NULL;
  void* moved = __libc_realloc(block, bytes);
  return block ? moved : counted(moved);
}
void* memalign(size_t alignment, size_t bytes) {
  return fails(0) ? NULL : counted(__libc_memalign(alignment, bytes));
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  return fails(0) ? NULL : counted(__libc_memalign(alignment, bytes));
}
int posix_memalign(void** to, size_t alignment, size_t bytes) {
  if (fails(alignment == kTorchAlignment)) return ENOMEM;
  *to = counted(__libc_memalign(alignment, bytes));
  return *to ? 0 : ENOMEM;
}
void free(void* block) {
  if (block) atomic_fetch_sub_explicit(&blocks, 1, memory_order_relaxed);
  __libc_free(block);
}

// ---- what the test calls ----

// Finds the code of libse_ext, which is loaded by then.
void memory_start(void) {
  void* frames[1];
  backtrace(frames, 1);  // loads what it needs
  dl_iterate_phdr(find_code, NULL);
  in_parallel = (int (*)(void))dlsym(RTLD_DEFAULT, "omp_in_parallel");
  prints = getenv("PRINT_STACKS") != NULL;
}

int memory_is_ready(void) {
  return begin != 0 && in_parallel != NULL;
}

// Lists this thread's allocations until memory_stop.
void memory_list(void) {
  at = 0;
  atomic_store(&is_watched, 1);
  mode = kList;
}

// This thread's allocation of that number fails, and behind it the memory of all tensors, until memory_stop.
void memory_fail(long number, int and_tensors) {
  at = failures = 0;
  first = number;
  tensors_fail = and_tensors;
  mode = kFail;
}

// Returns the number of allocations since.
long memory_stop(void) {
  mode = kOff;
  atomic_store(&is_watched, 0);
  return at;
}

int memory_is_ours(long number) {
  return number < kMostAllocations && is_ours[number];
}
long memory_failures(void) {
  return failures;
}
long memory_blocks(void) {
  return atomic_load(&blocks);
}
long memory_in_regions(void) {
  return atomic_load(&in_regions);
}
