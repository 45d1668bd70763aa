#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "fibers.h"
#include "launch.h"

#ifdef CUDA_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {
namespace {

constexpr int kWarpKinds = 4;  // of Barrier, from Barrier::Warp on

const char* name_of(Barrier kind) {
  constexpr const char* names[] = {"__syncthreads()",   "cluster_barrier()",  "__syncwarp()",
                                   "__shfl_xor_sync()", "__shfl_down_sync()", "__shfl_sync()"};
  return names[static_cast<int>(kind)];
}

struct Thread;

// Where threads wait for each other: a block, a warp or the cluster, and the kind of barrier.
struct Meeting {
  std::size_t expected;
  std::vector<Thread*> waiting;
};

struct Warp {
  Meeting meetings[kWarpKinds];
  // Of this shuffle and the one before it, whose values a slower lane may still have to read.
  std::uint64_t values[2][32];
};

struct Block {
  uint3 index;
  int rank;
  int running;  // threads that haven't exited
  char* shared = nullptr;
  Meeting meeting;
};

struct Copy {
  uint4* to;
  uint4 value;
};

struct Thread {
  uint3 index;
  int lane;
  Warp* warp;
  Block* block;
  Fiber* fiber;  // null until it begins
  unsigned shuffles;
  bool exited;
  bool has_arrived;  // at the cluster's barrier, and does not wait there yet
  bool knows_peers;  // to have begun: a barrier of the cluster lies behind it
  Barrier waits_at;
  Place waits_in;
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;  // of the copies: where each ends
};

// The launch under way. Threads and warps lie block by block; vectors keep their memory from launch to launch.
const Launch* current;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<Block> blocks;  // of one cluster
Meeting cluster_meeting;
std::vector<Thread*> ready;
std::size_t exited;
Thread* here;  // the thread that runs
Fiber* host;   // who launched

std::deque<Fiber> fibers;
std::vector<Fiber*> free_fibers;

// ---- messages ----

std::string kernel_name() {
  char name[512];
#ifdef CUDA_HOST_ASAN
  __sanitizer_symbolize_pc(const_cast<char*>(static_cast<const char*>(current->kernel)) + 1, "%f", name, sizeof name);
#else
  snprintf(name, sizeof name, "at %p", current->kernel);
#endif
  return name;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  fprintf(stderr, "cuda_host: %s\n  in kernel %s, block (%u, %u, %u), thread (%u, %u, %u)\n", what,
          kernel_name().c_str(), blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
#ifdef CUDA_HOST_ASAN
  __sanitizer_print_stack_trace();
#endif
  abort();
}

[[noreturn]] void deadlock() {
  for (std::size_t i = 0; i < threads.size(); ++i) {
    const Thread& t = threads[i];
    if (!t.exited) continue;
    for (const Meeting& meeting : t.warp->meetings) {
      if (meeting.waiting.empty() || &meeting == &t.warp->meetings[0]) continue;
      fprintf(stderr, "cuda_host: shuffle: lane %d of warp %zu has exited\n", t.lane,
              i / 32 % (warps.size() / blocks.size()));
    }
  }
  fprintf(stderr, "cuda_host: deadlock in kernel %s, %zu of %zu threads have exited\n", kernel_name().c_str(), exited,
          threads.size());
  std::map<std::pair<Barrier, unsigned>, std::vector<const Thread*>> places;
  for (const Thread& t : threads) {
    if (!t.exited) places[{t.waits_at, t.waits_in.line()}].push_back(&t);
  }
  for (const auto& [place, waiting] : places) {
    const Thread& t = *waiting[0];
    fprintf(stderr, "  %zu wait at %s, %s:%u, first of them block (%u, %u, %u) thread (%u, %u, %u)\n", waiting.size(),
            name_of(t.waits_at), t.waits_in.file_name(), t.waits_in.line(), t.block->index.x, t.block->index.y,
            t.block->index.z, t.index.x, t.index.y, t.index.z);
  }
  abort();
}

// ---- order ----

// xorshift64*, Vigna 2016
std::size_t random_below(std::size_t n) {
  static std::uint64_t state = [] {
    const char* seed = getenv("SE_EXT_HOST_SEED");
    return (seed ? strtoull(seed, nullptr, 0) : 1) * 0x9e3779b97f4a7c15u | 1;
  }();
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (state * 0x2545f4914f6cdd1du >> 32) * n >> 32;
}

// 0, …, n - 1 in an order that looks random.
class Order {
 public:
  explicit Order(std::uint64_t n) : n_(n), step_(1), next_(0) {
    if (n < 2) return;
    next_ = random_below(n < UINT32_MAX ? n : UINT32_MAX);
    do {
      step_ = 1 + random_below(n < UINT32_MAX ? n - 1 : UINT32_MAX);
    } while (std::gcd(step_, n) != 1);
  }
  std::uint64_t operator()() {
    const std::uint64_t now = next_;
    next_ = (next_ + step_) % n_;
    return now;
  }

 private:
  std::uint64_t n_, step_, next_;
};

Thread& pick() {
  if (ready.empty()) deadlock();
  std::swap(ready[random_below(ready.size())], ready.back());
  Thread* next = ready.back();
  ready.pop_back();
  return *next;
}

// ---- threads ----

void worker();

Fiber* take_fiber() {
  if (free_fibers.empty()) return &fibers.emplace_back(worker);
  Fiber* fiber = free_fibers.back();
  free_fibers.pop_back();
  return fiber;
}

void set_running(Thread& next) {
  here = &next;
  threadIdx = next.index;
  blockIdx = next.block->index;
}

// A block's shared memory is gone with it, for its cluster too.
void close_shared(Block& block) {
  if (block.shared) memset(block.shared, 0xff, current->shared_bytes);
#ifdef CUDA_HOST_ASAN
  __asan_poison_memory_region(block.shared, current->shared_bytes);
#endif
}

void open_shared([[maybe_unused]] Block& block) {
#ifdef CUDA_HOST_ASAN
  __asan_unpoison_memory_region(block.shared, current->shared_bytes);
#endif
}

void finish(Thread& self) {
  if (!self.copies.empty()) fail("copies: a thread has exited without copies_wait()");
  self.groups.clear();
  self.exited = true;
  ++exited;
  if (--self.block->running == 0) close_shared(*self.block);
}

// On every fiber but the host's: runs one thread after another. A thread that has not begun is called on the stack at
// hand if that is free; one that waits is switched to.
void worker() {
  for (;;) {
    current->body(current->arguments);
    Thread& self = *here;
    Fiber& fiber = *self.fiber;
    finish(self);
    if (exited == threads.size()) {
      free_fibers.push_back(&fiber);
      Fiber::switch_to(fiber, *host);
      continue;  // somebody has taken the fiber for another thread
    }
    Thread& next = pick();
    set_running(next);
    if (next.fiber == nullptr) {
      next.fiber = &fiber;
    } else {
      free_fibers.push_back(&fiber);
      Fiber::switch_to(fiber, *next.fiber);
    }
  }
}

void wait_in(Meeting& meeting, Barrier kind, Place where) {
  Thread& self = *here;
  self.waits_at = kind;
  self.waits_in = where;
  meeting.waiting.push_back(&self);
  if (meeting.waiting.size() == meeting.expected) {
    ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  Thread& next = pick();
  if (&next == &self) return;
  set_running(next);
  if (next.fiber == nullptr) next.fiber = take_fiber();
  Fiber::switch_to(*self.fiber, *next.fiber);
}

Meeting& meeting_of(Thread& thread, Barrier kind) {
  if (kind == Barrier::Block) return thread.block->meeting;
  if (kind == Barrier::Cluster) return cluster_meeting;
  return thread.warp->meetings[static_cast<int>(kind) - static_cast<int>(Barrier::Warp)];
}

void require_full(const char* what, unsigned mask) {
  if (mask != 0xffffffffu) fail("%s: only the full mask is emulated, got 0x%x", what, mask);
}

std::size_t count(dim3 d) {
  return std::size_t{d.x} * d.y * d.z;
}

uint3 index_of(std::size_t i, dim3 size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

void set_up() {
  const std::size_t size = count(current->block), of_cluster = count(current->cluster);
  if (size % 32 != 0) fail("blocks of %zu threads: only whole warps are emulated", size);
  threads.resize(size * of_cluster);
  warps.resize(threads.size() / 32);
  blocks.resize(of_cluster);
  cluster_meeting.expected = threads.size();
  for (Warp& warp : warps) {
    for (Meeting& meeting : warp.meetings) meeting.expected = 32;
  }
  for (Block& block : blocks) {
    block.rank = static_cast<int>(&block - blocks.data());
    block.meeting.expected = size;
    // Of the exact size, so that the sanitizer sees an access beyond it.
    block.shared = current->shared_bytes > 0 ? static_cast<char*>(malloc(current->shared_bytes)) : nullptr;
    close_shared(block);
  }
  for (std::size_t i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.index = index_of(i % size, current->block);
    t.lane = static_cast<int>(i % 32);
    t.warp = &warps[i / 32];
    t.block = &blocks[i / size];
  }
  blockDim = current->block;
  gridDim = current->grid;
}

void run_cluster(uint3 cluster) {
  const dim3& size = current->cluster;
  for (Block& block : blocks) {
    const uint3 within = index_of(block.rank, size);
    block.index = {cluster.x * size.x + within.x, cluster.y * size.y + within.y, cluster.z * size.z + within.z};
    block.running = static_cast<int>(threads.size() / blocks.size());
    open_shared(block);
  }
  for (Thread& t : threads) {
    t.fiber = nullptr;
    t.shuffles = 0;
    t.exited = t.has_arrived = t.knows_peers = false;
    ready.push_back(&t);
  }
  exited = 0;
  Thread& first = pick();
  set_running(first);
  first.fiber = take_fiber();
  Fiber::switch_to(*host, *first.fiber);
}

}  // namespace

void run(const Launch& l) {
  Fiber caller;
  current = &l;
  host = &caller;
  set_up();
  const dim3 clusters(l.grid.x / l.cluster.x, l.grid.y / l.cluster.y, l.grid.z / l.cluster.z);
  const std::size_t n = count(clusters);
  Order order(n);
  for (std::size_t i = 0; i < n; ++i) run_cluster(index_of(order(), clusters));
  for (Block& block : blocks) {
    open_shared(block);
    free(block.shared);
  }
}

void arrive() {
  if (here->has_arrived) fail("cluster_arrive: twice before cluster_wait()");
  here->has_arrived = true;
}

void wait(Barrier kind, Place where) {
  Thread& self = *here;
  if (kind == Barrier::Cluster) {
    if (!self.has_arrived) fail("cluster_wait: before cluster_arrive()");
    self.has_arrived = false;
    if (!current->knows_clusters) kind = Barrier::Block;
  }
  wait_in(meeting_of(self, kind), kind, where);
  self.knows_peers |= kind == Barrier::Cluster;
}

void wait_warp(unsigned mask, Place where) {
  require_full("__syncwarp", mask);
  wait_in(meeting_of(*here, Barrier::Warp), Barrier::Warp, where);
}

std::uint64_t exchange(Barrier kind, unsigned mask, std::uint64_t value, int source, Place where) {
  require_full("shuffle", mask);
  Thread& self = *here;
  auto& values = self.warp->values[self.shuffles++ & 1];
  values[self.lane] = value;
  wait_in(meeting_of(self, kind), kind, where);
  return values[source];
}

int lane() {
  return here->lane;
}

char* shared_memory() {
  return here->block->shared;
}

void require_shared(const char* what, const void* address, std::size_t bytes) {
  const auto offset = static_cast<const char*>(address) - here->block->shared;
  if (here->block->shared == nullptr || offset < 0 || offset + bytes > current->shared_bytes) {
    fail("%s: %p is not in the block's %zu bytes of shared memory", what, address, current->shared_bytes);
  }
}

void require_aligned(const char* what, const void* address, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) {
    fail("%s: %p is not aligned to %zu bytes", what, address, alignment);
  }
}

int cluster_size() {
  return current->knows_clusters ? static_cast<int>(blocks.size()) : 1;
}

int cluster_rank() {
  return current->knows_clusters ? here->block->rank : 0;
}

void* shared_of_rank(const void* address, std::size_t bytes, int rank) {
  if (rank < 0 || rank >= cluster_size()) fail("shared_of_rank: rank %d in a cluster of %d", rank, cluster_size());
  require_shared("shared_of_rank", address, bytes);
  if (rank != cluster_rank() && !here->knows_peers) {
    fail("shared_of_rank: the block of rank %d may not have begun", rank);
  }
  const Block& there = current->knows_clusters ? blocks[rank] : *here->block;
  if (there.running == 0) fail("shared_of_rank: the block of rank %d has exited", rank);
  return there.shared + (static_cast<const char*>(address) - here->block->shared);
}

void begin_copy(uint4* to, const uint4& value) {
  here->copies.push_back({to, value});
}

void commit_copies() {
  here->groups.push_back(here->copies.size());
}

void finish_copies(std::size_t newest) {
  std::vector<Copy>& copies = here->copies;
  std::vector<std::size_t>& groups = here->groups;
  if (groups.size() <= newest) return;
  const auto last = groups.end() - static_cast<std::ptrdiff_t>(newest) - 1;
  const std::size_t finished = *last;
  for (std::size_t i = 0; i < finished; ++i) *copies[i].to = copies[i].value;
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(finished));
  groups.erase(groups.begin(), last + 1);
  for (std::size_t& end : groups) end -= finished;
}

}  // namespace cuda_host
