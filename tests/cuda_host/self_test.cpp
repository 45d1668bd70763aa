// Each promise of the stand-in, kept or broken on purpose: `build.py --self-test`.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cuda/kernels/platform.cuh"

using namespace se_ext::cuda;

namespace {

int failures = 0;

void expect(bool right, const char* what) {
  printf("%s %s\n", right ? "ok    " : "FAILED", what);
  failures += !right;
}

struct Shape {
  dim3 grid = 1, block = 32;
  std::size_t shared = 0;
  dim3 cluster = 0;  // none
};

template <class... P, class... A>
cudaError_t launch(Shape shape, void (*kernel)(P...), A... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster.x != 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Runs f in a child process that must die with `message` in what it writes.
template <class F>
void expect_death(const char* what, const std::string& message, const F& f) {
  int ends[2];
  fflush(stdout);
  if (pipe(ends) != 0) abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    f();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool right = status != 0 && text.find(message) != std::string::npos;
  expect(right, what);
  if (!right) printf("status %d, expected \"%s\" in:\n%s\n", status, message.c_str(), text.c_str());
}

// ---- kernels that are right ----

__global__ void index_kernel(uint4* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = make_uint4(block, thread, threadIdx.y, 1);
}

__global__ void __launch_bounds__(256) sum_kernel(const float* x, float* sums, int n) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = thread; i < n; i += blockDim.x) sum += x[static_cast<std::int64_t>(blockIdx.x) * n + i];
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (thread % 32 == 0) shared[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += shared[w];
    sums[blockIdx.x] = sum;
  }
}

__global__ void shuffle_kernel(double* out) {
  const int lane = static_cast<int>(threadIdx.x);
  double* mine = out + lane * 6;
  mine[0] = __shfl_xor_sync(0xffffffffu, lane * 0.5, 5);
  mine[1] = __shfl_down_sync(0xffffffffu, lane, 3);
  mine[2] = static_cast<double>(__shfl_sync(0xffffffffu, lane + (1LL << 40), 7));
  mine[3] = __shfl_down_sync(0xffffffffu, static_cast<float>(lane), 3, 8);
  mine[4] = __shfl_sync(0xffffffffu, lane, 9, 8);
  __syncwarp();
  mine[5] = __shfl_xor_sync(0xffffffffu, lane, 8, 8);
}

// Every block's sum of its cluster's ranks, `rounds` times over.
__global__ void cluster_kernel(int* out, int rounds) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  cluster_arrive();
  cluster_wait();
  for (int round = 0; round < rounds; ++round) {
    shared[threadIdx.x] = cluster_rank() * 1000 + static_cast<int>(threadIdx.x);
    cluster_barrier();
    int sum = 0;
    for (int r = 0; r < cluster_size(); ++r) sum += *shared_of_rank(shared + (threadIdx.x + 1) % blockDim.x, r);
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    cluster_barrier();
  }
}

__global__ void copy_kernel(const uint4* from, uint4* to, bool wait) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  copy16(shared + threadIdx.x, from + threadIdx.x);
  copies_commit();
  if (wait) copies_wait<0>();
  __syncthreads();
  store_streaming(to + threadIdx.x, shared[(threadIdx.x + 1) % blockDim.x]);
  if (!wait) copies_wait<0>();
}

// Three groups of a copy, of none and of two; after a wait but for the newest, and after a wait for all.
__global__ void groups_kernel(const uint4* from, uint4* seen) {
  if (threadIdx.x != 0) return;
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  copy16(shared, from);
  copies_commit();
  copies_commit();
  copy16(shared + 1, from + 1);
  copy16(shared + 2, from + 2);
  copies_commit();
  copies_wait<2>();
  for (int i = 0; i < 3; ++i) seen[i] = shared[i];
  copies_wait<1>();
  for (int i = 0; i < 3; ++i) seen[3 + i] = shared[i];
  copies_wait<0>();
  for (int i = 0; i < 3; ++i) seen[6 + i] = shared[i];
}

__global__ void shared_kernel(int* wrong, std::size_t bytes) {
  for (std::size_t i = threadIdx.x; i < bytes; i += blockDim.x) {
    if (static_cast<unsigned char>(dynamic_shared()[i]) != 0xff) ++*wrong;
  }
  __syncthreads();
  for (std::size_t i = threadIdx.x; i < bytes; i += blockDim.x) dynamic_shared()[i] = 1;
}

__global__ void order_kernel(int* order, int* next) {
  __syncthreads();
  order[(*next)++] = static_cast<int>(threadIdx.x);
  __syncthreads();
  order[(*next)++] = static_cast<int>(threadIdx.x);
}

__global__ void nothing_kernel() {}

// ---- kernels that are wrong ----

__global__ void missing_barrier_kernel(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

[[maybe_unused]] __global__ void read_kernel(const float* x, float* y, int at) {
  y[threadIdx.x] = x[threadIdx.x + at];
}

[[maybe_unused]] __global__ void wide_read_kernel(const float* x, unsigned* y) {
  *y = reinterpret_cast<const uint4*>(x)->x;
}

[[maybe_unused]] __global__ void beyond_shared_kernel(std::size_t at) {
  dynamic_shared()[at] = 1;
}

__global__ void some_wait_kernel(bool exit) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else if (!exit) {
    cluster_barrier();
  }
}

__global__ void lane_exits_kernel(int* out) {
  if (threadIdx.x == 37) return;
  *out = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void half_mask_kernel(int* out) {
  *out = __shfl_xor_sync(0xffffu, 1, 1);
}

__global__ void peer_exited_kernel(bool early) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  int* peer = nullptr;
  cluster_barrier();
  if (early) peer = shared_of_rank(shared, 1 - cluster_rank());
  cluster_barrier();
  if (cluster_rank() == 1) return;
  for (int i = 0; i < 100; ++i) __syncthreads();  // long enough
  if (!early) peer = shared_of_rank(shared, 1 - cluster_rank());
  *peer = 1;
}

__global__ void rank_kernel(int rank, int at) {
  shared_of_rank(dynamic_shared() + at, rank);
}

__global__ void alone_kernel(int* out) {
  cluster_barrier();
  out[blockIdx.x] = 10 * cluster_size() + cluster_rank();
}

__global__ void halves_kernel(int arrivals) {
  for (int i = 0; i < arrivals; ++i) cluster_arrive();
  cluster_wait();
}

__global__ void no_wait_kernel(const uint4* from) {
  copy16(dynamic_shared(), from);
}

__global__ void copy_to_kernel(const char* from, int at, char* elsewhere) {
  copy16(elsewhere ? elsewhere : dynamic_shared() + at, from);
  copies_commit();
  copies_wait<0>();
}

__global__ void streaming_kernel(char* to) {
  store_streaming(reinterpret_cast<uint4*>(to), uint4{});
}

__global__ void deep_kernel(int n) {
  volatile char frame[4096];
  frame[n % 4096] = 1;
  if (n > 0) deep_kernel(n - 1);
  frame[n % 4096] = frame[(n + 1) % 4096];
}

// ---- cases ----

void test_values() {
  std::vector<uint4> index(2 * 3 * 5 * 64);
  expect(launch({.grid = {2, 3, 5}, .block = {8, 4, 2}}, index_kernel, index.data()) == cudaSuccess, "launch in 3D");
  bool right = true;
  for (unsigned i = 0; i < index.size(); ++i) {
    const uint4 v = index[i];
    right &= v.x == i / 64 && v.y == i % 64 && v.z == i / 8 % 4 && v.w == 1;
  }
  expect(right, "indices of blocks and threads");

  const int n = 1000, blocks = 7;
  std::vector<float> x(blocks * n), sums(blocks);
  for (int i = 0; i < blocks * n; ++i) x[i] = static_cast<float>(i % 17);
  launch({.grid = blocks, .block = 256, .shared = 32}, sum_kernel, x.data(), sums.data(), n);
  right = true;
  for (int b = 0; b < blocks; ++b) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += x[b * n + i];
    right &= sum == sums[b];
  }
  expect(right, "a block's sum by shuffles and shared memory");

  std::vector<double> out(32 * 6);
  launch({}, shuffle_kernel, out.data());
  right = true;
  for (int i = 0; i < 32; ++i) {
    const double* v = &out[i * 6];
    right &= v[0] == (i ^ 5) * 0.5 && v[1] == (i + 3 < 32 ? i + 3 : i) && v[2] == 7 + 0x1p40;
    right &= v[3] == (i % 8 + 3 < 8 ? i + 3 : i) && v[4] == i / 8 * 8 + 1 && v[5] == ((i ^ 8) < i ? i ^ 8 : i);
  }
  expect(right, "shuffles of every kind and width");

  std::vector<int> ranks(24 * 64);
  launch({.grid = 24, .block = 64, .shared = 256, .cluster = 8}, cluster_kernel, ranks.data(), 3);
  right = true;
  for (int i = 0; i < 24 * 64; ++i) right &= ranks[i] == 28000 + 8 * ((i + 1) % 64);
  expect(right, "a cluster's sum through shared_of_rank");
  launch({.grid = {4, 3, 2}, .block = 64, .shared = 256, .cluster = {2, 1, 2}}, cluster_kernel, ranks.data(), 1);
  launch({.grid = 1, .block = 64, .shared = 256}, cluster_kernel, ranks.data(), 1);
  expect(ranks[0] == 1, "a cluster of one block without the attribute");

  int wrong = 0;
  launch({.grid = 20, .block = 64, .shared = 1001}, shared_kernel, &wrong, std::size_t{1001});
  expect(wrong == 0, "shared memory is 0xff at a block's start");

  std::vector<uint4> from(64), to(64);
  for (unsigned i = 0; i < 64; ++i) from[i] = make_uint4(i, 1, 2, 3);
  launch({.block = 64, .shared = 1024}, copy_kernel, from.data(), to.data(), true);
  right = true;
  for (unsigned i = 0; i < 64; ++i) right &= to[i].x == (i + 1) % 64 && to[i].w == 3;
  expect(right, "copy16, waited for");
  launch({.block = 64, .shared = 1024}, copy_kernel, from.data(), to.data(), false);
  right = std::any_of(to.begin(), to.end(), [](uint4 v) { return v.x == 0xffffffff; });
  expect(right, "copy16, waited for too late, has not taken place");
  std::vector<uint4> seen(9);
  launch({.shared = 48}, groups_kernel, from.data(), seen.data());
  right = true;
  for (unsigned i = 0; i < 9; ++i) right &= seen[i].x == (i == 0 || i == 3 || i >= 6 ? i % 3 : 0xffffffff);
  expect(right, "copies in groups: all but the newest ones are waited for");

  std::vector<int> order(512), second(256);
  int next = 0;
  launch({.block = 256}, order_kernel, order.data(), &next);
  std::copy(order.begin() + 256, order.end(), second.begin());
  order.resize(256);
  const bool differ = order != second && !std::is_sorted(order.begin(), order.end());
  std::sort(order.begin(), order.end());
  right = true;
  for (int i = 0; i < 256; ++i) right &= order[i] == i;
  expect(right && differ, "every thread in another order after each barrier");

  std::vector<int> reversed(256);
  const auto is_right = [&](bool barrier) {
    launch({.block = 256, .shared = 1024}, missing_barrier_kernel, reversed.data(), barrier);
    bool all = true;
    for (int i = 0; i < 256; ++i) all &= reversed[i] == 255 - i;
    return all;
  };
  expect(is_right(true) && !is_right(false), "a missing barrier gives a wrong result");

  std::vector<std::thread> hosts;
  std::vector<std::vector<float>> results(4, std::vector<float>(blocks));
  for (auto& r : results) {
    hosts.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        launch({.grid = blocks, .block = 256, .shared = 32}, sum_kernel, x.data(), r.data(), n);
      }
    });
  }
  for (auto& host : hosts) host.join();
  expect(std::all_of(results.begin(), results.end(), [&](const auto& r) { return r == sums; }),
         "launches from several host threads");
}

void test_errors() {
  const auto fails = [](Shape shape, cudaError_t with) {
    const bool right = launch(shape, nothing_kernel) == with && cudaPeekAtLastError() == with;
    return right && cudaGetLastError() == with && cudaGetLastError() == cudaSuccess;
  };
  expect(fails({.grid = 0}, cudaErrorInvalidConfiguration), "a grid of no blocks");
  expect(fails({.grid = 0x80000000u}, cudaErrorInvalidConfiguration), "a grid of 2^31 in x");
  expect(fails({.grid = {1, 65536}}, cudaErrorInvalidConfiguration), "a grid of 65536 in y");
  expect(fails({.grid = {1, 1, 65536}}, cudaErrorInvalidConfiguration), "a grid of 65536 in z");
  expect(fails({.block = 1056}, cudaErrorInvalidConfiguration), "a block of 1056 threads");
  expect(fails({.block = {32, 1, 65}}, cudaErrorInvalidConfiguration), "a block of 65 in z");
  expect(fails({.grid = 16, .cluster = 16}, cudaErrorInvalidClusterSize), "a cluster of 16 blocks");
  expect(fails({.grid = 9, .cluster = 8}, cudaErrorInvalidClusterSize), "a cluster that doesn't divide the grid");
  expect(fails({.shared = 49153}, cudaErrorInvalidValue), "more than 48 KB of shared memory, not asked for before");
  expect(fails({.grid = {1, 65535}, .shared = 49152}, cudaSuccess), "the largest grid in y, 48 KB");

  constexpr auto kBytes = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect(cudaFuncSetAttribute(nothing_kernel, kBytes, 232449) == cudaErrorInvalidValue, "more than a block may have");
  cudaGetLastError();
  expect(cudaFuncSetAttribute(nothing_kernel, kBytes, 232448) == cudaSuccess, "all that a block may have");
  expect(fails({.shared = 232448}, cudaSuccess), "… at the launch");
  cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  expect(fails({.grid = 16, .cluster = 16}, cudaSuccess), "a cluster of 16 blocks, allowed");

  int value = 0, set = 0, lowered = 0;
  cuda_host_limits(&set, &lowered);
  cudaFuncSetAttribute(nothing_kernel, kBytes, 100000);
  expect(fails({.shared = 100001}, cudaErrorInvalidValue), "more than a limit that was lowered");
  cuda_host_limits(&set, &lowered);
  expect(set == 1 && lowered == 1, "a limit that was lowered is counted");
  const auto* nothing = reinterpret_cast<const void*>(nothing_kernel);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, nothing, 32, 100000);
  expect(value == 2, "thread blocks per multiprocessor");
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, nothing, 32, 100001);
  expect(value == 0, "… none above the kernel's limit");
  const auto clusters = [&](unsigned blocks) {
    cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {{blocks, 1, 1}}};
    const cudaLaunchConfig_t config{blocks, 32, 100000, nullptr, &attribute, 1};
    int count = -1;
    return cudaOccupancyMaxActiveClusters(&count, nothing, &config) == cudaSuccess ? count : -1;
  };
  expect(clusters(4) == 66, "clusters at a time");
  cuda_host_set_room(2);
  expect(clusters(4) == 0 && clusters(2) == 132, "clusters in a part of a GPU");
  expect(fails({.grid = 4, .cluster = 4}, cudaErrorInvalidClusterSize), "… launched");
  cuda_host_set_room(0);
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, nothing);
  expect(attributes.ptxVersion == 90 && attributes.binaryVersion == 90, "what a kernel was compiled for");
  cuda_host_set_ptx(80);
  cudaFuncGetAttributes(&attributes, nothing);
  int ranks[2] = {-1, -1};
  launch({.grid = 2, .cluster = 2}, alone_kernel, ranks);
  expect(attributes.ptxVersion == 80 && attributes.binaryVersion == 90 && ranks[0] == 10 && ranks[1] == 10,
         "in code for a GPU without clusters each block is the only one");
  cuda_host_set_ptx(0);

  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0);
  expect(value == 132, "an attribute");
  cuda_host_set_attribute(cudaDevAttrMultiProcessorCount, 3);
  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0);
  expect(value == 3, "an attribute that a test has set");
  cuda_host_set_attribute(cudaDevAttrComputeCapabilityMajor, 8);
  expect(fails({.grid = 2, .cluster = 2}, cudaErrorNotSupported), "a cluster before sm_90");
  cuda_host_set_attribute(cudaDevAttrComputeCapabilityMajor, 9);
  expect(cudaGetDevice(&value) == cudaSuccess && value == 0, "the device");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, 1) == cudaErrorInvalidDevice, "a device too many");
}

void test_deaths() {
  std::vector<float> x(100), y(100);
  alignas(16) static char bytes[64];
  expect_death("a barrier that exited threads don't reach", "40 wait at __syncthreads()",
               [] { launch({.block = 64}, some_wait_kernel, true); });
  expect_death("… named with what has exited", "24 of 64 threads have exited",
               [] { launch({.block = 64}, some_wait_kernel, true); });
  expect_death("… and the line", "self_test.cpp:", [] { launch({.block = 64}, some_wait_kernel, true); });
  expect_death("barriers of different kinds", "24 wait at cluster_barrier()",
               [] { launch({.block = 64}, some_wait_kernel, false); });
  expect_death("a shuffle without a lane", "shuffle: lane 5 of warp 1 has exited",
               [&] { launch({.block = 96}, lane_exits_kernel, reinterpret_cast<int*>(bytes)); });
  expect_death("a shuffle of some lanes", "only the full mask",
               [&] { launch({}, half_mask_kernel, reinterpret_cast<int*>(bytes)); });
  expect_death("part of a warp", "only whole warps", [] { launch({.block = 33}, nothing_kernel); });
  expect_death("shared_of_rank of a block that has exited", "the block of rank 1 has exited",
               [] { launch({.grid = 2, .shared = 64, .cluster = 2}, peer_exited_kernel, false); });
  expect_death("shared_of_rank before the cluster's first barrier", "the block of rank 1 may not have begun",
               [] { launch({.grid = 2, .shared = 64, .cluster = 2}, rank_kernel, 1, 0); });
  expect_death("cluster_wait without cluster_arrive", "cluster_wait: before cluster_arrive()",
               [] { launch({.grid = 2, .cluster = 2}, halves_kernel, 0); });
  expect_death("cluster_arrive twice", "cluster_arrive: twice before cluster_wait()",
               [] { launch({.grid = 2, .cluster = 2}, halves_kernel, 2); });
  expect_death("shared_of_rank beyond the cluster", "rank 2 in a cluster of 2",
               [] { launch({.grid = 2, .shared = 64, .cluster = 2}, rank_kernel, 2, 0); });
  expect_death("shared_of_rank of what isn't shared", "is not in the block's 64 bytes of shared memory",
               [] { launch({.grid = 2, .shared = 64, .cluster = 2}, rank_kernel, 0, 64); });
  expect_death("copies that nobody waits for", "without copies_wait()",
               [&] { launch({.shared = 16}, no_wait_kernel, reinterpret_cast<const uint4*>(bytes)); });
  expect_death("copy16 to an address not aligned", "is not aligned to 16 bytes",
               [&] { launch({.shared = 64}, copy_to_kernel, bytes, 8, nullptr); });
  expect_death("copy16 from an address not aligned", "is not aligned to 16 bytes",
               [&] { launch({.shared = 64}, copy_to_kernel, bytes + 4, 0, nullptr); });
  expect_death("copy16 beyond shared memory", "is not in the block's 64 bytes of shared memory",
               [&] { launch({.shared = 64}, copy_to_kernel, bytes, 64, nullptr); });
  expect_death("copy16 to global memory", "is not in the block's 64 bytes of shared memory",
               [&] { launch({.shared = 64}, copy_to_kernel, bytes, 0, bytes); });
  expect_death("store_streaming to an address not aligned", "is not aligned to 16 bytes",
               [&] { launch({}, streaming_kernel, bytes + 8); });
#ifdef CUDA_HOST_ASAN
  expect_death("a message has the kernel's name", "some_wait_kernel",
               [] { launch({.block = 64}, some_wait_kernel, true); });
  expect_death("a read beyond a buffer", "heap-buffer-overflow", [&] { launch({}, read_kernel, &x[0], &y[0], 69); });
  expect_death("a stack trace of it", "read_kernel", [&] { launch({}, read_kernel, &x[0], &y[0], 69); });
  expect_death("a write beyond shared memory", "heap-buffer-overflow",
               [] { launch({.shared = 1001}, beyond_shared_kernel, std::size_t{1001}); });
  expect_death("a write to the shared memory of a block that has exited", "use-after-poison",
               [] { launch({.grid = 2, .shared = 64, .cluster = 2}, peer_exited_kernel, true); });
  expect_death("a wide access not aligned", "misaligned address",
               [&] { launch({}, wide_read_kernel, &x[1], reinterpret_cast<unsigned*>(&y[0])); });
  expect_death("a stack that overflows", "stack-overflow", [] { launch({}, deep_kernel, 1000); });
#else
  expect_death("a stack that overflows", "", [] { launch({}, deep_kernel, 1000); });
#endif
}

// A float's nearest neighbour among the halves from -65504 to 65504 and, past them, infinity; ties to the even one.
std::uint32_t nearest_half(float value) {
  if (value != value) return 0x7fff;
  const std::uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const double rounded = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // in units of the last place
  if (std::ldexp(rounded, exponent - 10) >= 65536) return sign | 0x7c00;
  return sign | (static_cast<std::uint32_t>((exponent + 14) << 10) + static_cast<std::uint32_t>(rounded));
}

void test_conversions() {
  bool right = true;
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float value = half_to_float(static_cast<std::uint16_t>(h));
    const bool nan = (h & 0x7fff) > 0x7c00;
    const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
    double expected = exponent == 31  ? HUGE_VAL
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
    if (h & 0x8000) expected = -expected;
    right &= nan ? value != value : value == expected && std::signbit(value) == std::signbit(expected);
    right &= float_to_half(value) == (nan ? 0x7fff : h);
    const float wide = bits_to_float(h << 16);
    right &= float_to_bfloat16(wide) == (wide != wide ? 0x7fff : h);
    right &= !std::isfinite(wide) ||
             float_to_bfloat162(bits_to_float((h << 16) + 0x8000), 1) == (0x3f800000 | (h + (h & 1)));
    right &= !std::isfinite(wide) || float_to_bfloat16(bits_to_float((h << 16) + 0x8001)) == h + 1;
    right &= !std::isfinite(wide) || float_to_bfloat16(bits_to_float((h << 16) + 0x7fff)) == h;
  }
  expect(right, "every half and bfloat16, there and back; ties to even");
  right = true;
  for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 997) {
    const float value = bits_to_float(static_cast<std::uint32_t>(bits));
    right &= std::isinf(value) || float_to_half(value) == nearest_half(value);
  }
  for (std::uint32_t h = 0; h < 0x7c00; ++h) {  // at and next to the midpoints
    const float midpoint = (half_to_float(h) + (h == 0x7bff ? 65536.f : half_to_float(h + 1))) / 2;
    for (float v : {midpoint, std::nextafter(midpoint, 0.f), std::nextafter(midpoint, 1e9f)}) {
      right &= float_to_half2(v, -v) == (nearest_half(v) | (nearest_half(v) | 0x8000) << 16);
    }
  }
  expect(right, "floats to half");
  expect(fast_exp2(-127) == 0 && fast_exp2(3) == 8 && fast_reciprocal(1e-40f) == HUGE_VALF &&
             fast_reciprocal(-0x1p127f) == 0 && fast_reciprocal(4) == 0.25f,
         "fast_exp2 and fast_reciprocal without subnormal numbers");
}

// ---- cost ----

__global__ void barriers_kernel(int barriers) {
  for (int i = 0; i < barriers; ++i) __syncthreads();
}

void measure() {
  const auto microseconds = [](unsigned blocks, int barriers) {
    double best = 1e9;
    for (int i = 0; i < 5; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      launch({.grid = blocks, .block = 256}, barriers_kernel, barriers);
      const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
      best = std::min(best, time.count() / blocks);
    }
    return best;
  };
  printf("a switch %.0f ns; a block of 256 threads with 0 barriers %.1f us, with 2 barriers %.1f us\n",
         microseconds(1, 1000) / 256e3 * 1e3, microseconds(1000, 0), microseconds(1000, 2));
}

}  // namespace

int main() {
  test_values();
  test_errors();
  test_deaths();
  test_conversions();
  measure();
  printf(failures ? "%d cases failed\n" : "all right\n", failures);
  return failures != 0;
}
