// All that the kernels ask of the device beyond C++ and CUDA's own words: shared memory, clusters, shuffles, copies
// past the registers, access hints, conversions. Inline PTX lives here alone, in functions of a line or two; their
// twins for the host, where the kernels run under test, are in tests/cuda_host/device_twin.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)

#define SE_EXT_DEVICE __device__ __forceinline__
#define SE_EXT_HOST_DEVICE __host__ __device__
#define SE_EXT_UNROLL _Pragma("unroll")
#define SE_EXT_UNROLL_4 _Pragma("unroll 4")

namespace se_ext::cuda {

// The block's dynamic shared memory, 16-byte aligned.
SE_EXT_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// ---- thread-block clusters: of one block before sm_90, and where a launch asks for none ----

SE_EXT_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

SE_EXT_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster in two halves: after the wait a thread sees all that was written to shared
// memory before the others arrived. Between the halves a thread may do what concerns no other block.
SE_EXT_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
SE_EXT_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
SE_EXT_DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// Where the block of that rank has what this block has at `shared`: to be used between a first barrier of the cluster,
// before which that block may not have begun, and a last one, after which it may have exited.
template <class A>
SE_EXT_DEVICE A* shared_of_rank(A* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<A*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
#else
  return shared;
#endif
}

// ---- global to shared memory, past the registers ----

// 16 bytes, both sides aligned; there after a wait for the copy's group and, for other threads, a barrier.
SE_EXT_DEVICE void copy16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// The copies that the thread has begun since the last call are a group, if only of none.
SE_EXT_DEVICE void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until the copies of all of the thread's groups are there, but of the `newest` last ones.
template <int newest>
SE_EXT_DEVICE void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
#endif
}

// A hint: the 128 bytes around the address will be read soon.
SE_EXT_DEVICE void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// ---- accesses ----

// A store that the caches may drop first: nobody reads the line again soon.
SE_EXT_DEVICE void store_streaming(uint4* to, uint4 value) {
  __stcs(to, value);
}

// ---- conversions: two half-typed values in a word, the first in the low half ----

SE_EXT_DEVICE float half_to_float(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

SE_EXT_DEVICE std::uint32_t float_to_half2(float first, float second) {
#if __CUDA_ARCH__ >= 800
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#else
  std::uint16_t low, high;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(low) : "f"(first));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(high) : "f"(second));
  return low | static_cast<std::uint32_t>(high) << 16;
#endif
}

SE_EXT_DEVICE float bits_to_float(std::uint32_t bits) {
  return __uint_as_float(bits);
}

#if __CUDA_ARCH__ < 800
SE_EXT_DEVICE std::uint32_t float_to_bfloat16(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#endif

SE_EXT_DEVICE std::uint32_t float_to_bfloat162(float first, float second) {
#if __CUDA_ARCH__ >= 800
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#else
  return float_to_bfloat16(first) | float_to_bfloat16(second) << 16;
#endif
}

// ---- arithmetic whose error is far below a half type's: 2^x, and 1 / x ----

SE_EXT_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SE_EXT_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace se_ext::cuda

#else
#define SE_EXT_DEVICE inline
#define SE_EXT_HOST_DEVICE
#define SE_EXT_UNROLL
#define SE_EXT_UNROLL_4
#include "device_twin.h"
#endif
