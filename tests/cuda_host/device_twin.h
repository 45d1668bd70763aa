// The host's twins of the functions in csrc/cuda/kernels/platform.cuh, which includes this where there is no nvcc.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

namespace se_ext::cuda {

SE_EXT_DEVICE char* dynamic_shared() {
  return cuda_host::shared_memory();
}

// ---- thread-block clusters ----

SE_EXT_DEVICE int cluster_size() {
  return cuda_host::cluster_size();
}
SE_EXT_DEVICE int cluster_rank() {
  return cuda_host::cluster_rank();
}
SE_EXT_DEVICE void cluster_arrive() {
  cuda_host::arrive();
}
SE_EXT_DEVICE void cluster_wait(cuda_host::Place where = cuda_host::Place::current()) {
  cuda_host::wait(cuda_host::Barrier::Cluster, where);
}
SE_EXT_DEVICE void cluster_barrier(cuda_host::Place where = cuda_host::Place::current()) {
  cluster_arrive();
  cluster_wait(where);
}
template <class A>
SE_EXT_DEVICE A* shared_of_rank(A* shared, int rank) {
  return static_cast<A*>(cuda_host::shared_of_rank(shared, sizeof(A), rank));
}

// ---- copies and accesses ----

SE_EXT_DEVICE void copy16(void* shared, const void* global) {
  cuda_host::require_aligned("copy16 to shared memory", shared, 16);
  cuda_host::require_aligned("copy16 from global memory", global, 16);
  cuda_host::require_shared("copy16", shared, 16);
  cuda_host::begin_copy(static_cast<uint4*>(shared), *static_cast<const uint4*>(global));
}
SE_EXT_DEVICE void copies_commit() {
  cuda_host::commit_copies();
}
template <int newest>
SE_EXT_DEVICE void copies_wait() {
  cuda_host::finish_copies(newest);
}
// Reads, so that the sanitizer sees an address of nothing.
SE_EXT_DEVICE void prefetch(const void* global) {
  (void)*static_cast<const volatile char*>(global);
}
SE_EXT_DEVICE void store_streaming(uint4* to, uint4 value) {
  cuda_host::require_aligned("store_streaming", to, 16);
  *to = value;
}

// ---- conversions: to the nearest, ties to even; every NaN becomes 0x7fff ----

SE_EXT_DEVICE float bits_to_float(std::uint32_t bits) {
  return __uint_as_float(bits);
}

SE_EXT_DEVICE float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return bits_to_float(fraction ? 0x7fffffff : sign | 0x7f800000);
  if (exponent == 0) return bits_to_float(sign | __float_as_uint(static_cast<float>(fraction) * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

SE_EXT_DEVICE std::uint32_t float_to_half(float value) {
  if (value != value) return 0x7fff;
  const std::uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more: infinity
  if (magnitude < 0x38800000) {                       // subnormal: a multiple of 2^-24
    return sign | static_cast<std::uint32_t>(nearbyintf(bits_to_float(magnitude) * 0x1p24f));
  }
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}
SE_EXT_DEVICE std::uint32_t float_to_half2(float first, float second) {
  return float_to_half(first) | float_to_half(second) << 16;
}

SE_EXT_DEVICE std::uint32_t float_to_bfloat16(float value) {
  if (value != value) return 0x7fff;
  const std::uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
SE_EXT_DEVICE std::uint32_t float_to_bfloat162(float first, float second) {
  return float_to_bfloat16(first) | float_to_bfloat16(second) << 16;
}

// ---- arithmetic, with subnormal numbers taken and given as zero ----

SE_EXT_DEVICE float flush(float x) {
  return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x;
}
SE_EXT_DEVICE float fast_exp2(float x) {
  return flush(exp2f(flush(x)));
}
SE_EXT_DEVICE float fast_reciprocal(float x) {
  return flush(1 / flush(x));
}

}  // namespace se_ext::cuda
