// A stand-in for CUDA's header: its words and the part of its API that csrc/cuda uses, for g++. Kernels run on the
// host, inside cudaLaunchKernelEx. What a word does is in device.cpp, what the API does in runtime.cpp.
#pragma once

#include <math.h>
#include <string.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "device.h"

// ---- words ----

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// There is no __shared__: a static variable would be one for all blocks of a cluster. dynamic_shared() is emulated.

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
constexpr uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// Those of the thread that runs; device.cpp writes them at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- barriers and shuffles ----

inline void __syncthreads(cuda_host::Place where = cuda_host::Place::current()) {
  cuda_host::wait(cuda_host::Barrier::Block, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_host::Place where = cuda_host::Place::current()) {
  cuda_host::wait_warp(mask, where);
}

namespace cuda_host {

template <class T>
T shuffle(Barrier kind, unsigned mask, T value, int source, Place where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(kind, mask, bits, source, where);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_host

// The source of a lane's value; the lane itself where that would be beyond its part of `width` lanes.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_host::Place where = cuda_host::Place::current()) {
  const int lane = cuda_host::lane(), source = lane ^ lane_mask, last = lane | (width - 1);
  return cuda_host::shuffle(cuda_host::Barrier::ShuffleXor, mask, value, source <= last ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_host::Place where = cuda_host::Place::current()) {
  const int lane = cuda_host::lane(), source = lane + static_cast<int>(delta), last = lane | (width - 1);
  return cuda_host::shuffle(cuda_host::Barrier::ShuffleDown, mask, value, source <= last ? source : lane, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_host::Place where = cuda_host::Place::current()) {
  const int first = cuda_host::lane() & ~(width - 1);
  return cuda_host::shuffle(cuda_host::Barrier::ShuffleIndex, mask, value, first | (source & (width - 1)), where);
}

// ---- arithmetic and accesses ----

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1 / sqrt(x);
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

// CUDA's global min and max, for arguments of one type.
#define CUDA_HOST_MIN_MAX(T)  \
  constexpr T min(T a, T b) { \
    return b < a ? b : a;     \
  }                           \
  constexpr T max(T a, T b) { \
    return a < b ? b : a;     \
  }
CUDA_HOST_MIN_MAX(int)
CUDA_HOST_MIN_MAX(unsigned)
CUDA_HOST_MIN_MAX(long)
CUDA_HOST_MIN_MAX(unsigned long)
CUDA_HOST_MIN_MAX(long long)
CUDA_HOST_MIN_MAX(unsigned long long)
#undef CUDA_HOST_MIN_MAX
inline float min(float a, float b) {
  return fminf(a, b);
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}
inline double min(double a, double b) {
  return fmin(a, b);
}
inline double max(double a, double b) {
  return fmax(a, b);
}

// ---- the API; numbers as in CUDA's headers ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMemoryClockRate = 36,
  cudaDevAttrGlobalMemoryBusWidth = 37,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 15,
};

enum { cudaSharedmemCarveoutMaxShared = 100 };

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
  int ptxVersion, binaryVersion;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,  // ignored: launches run one after another
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          std::size_t dynamic_bytes);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);

// The attributes are those of an H200 until a test says otherwise.
extern "C" __attribute__((visibility("default"))) void cuda_host_set_attribute(int attribute, int value);
// The architecture whose PTX the driver translated for the device (80: that of "8.0+PTX"); 0: compiled for the device.
extern "C" __attribute__((visibility("default"))) void cuda_host_set_ptx(int architecture);
// The most blocks of a cluster that find room, as on a part of a GPU; 0: as many as a whole GPU has room for.
extern "C" __attribute__((visibility("default"))) void cuda_host_set_room(int blocks);
// How often a kernel's limit of dynamic shared memory was set, and how often to less than before, since the last call.
extern "C" __attribute__((visibility("default"))) void cuda_host_limits(int* set, int* lowered);
// The most blocks in a cluster that a launch asked for since this was called last; 0 without a launch.
extern "C" __attribute__((visibility("default"))) int cuda_host_largest_cluster();

namespace cuda_host {

// What a process with adapters (that has guards) is held to: a launch is made inside a device guard, on the stream that
// was asked for there; any other fails.
inline constinit std::atomic<bool> has_guards = false;
inline constinit thread_local int guards = 0;
inline const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(0x5e);

// Calls body(arguments) once for every thread of the grid.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments);

}  // namespace cuda_host

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  static_assert((std::is_trivially_copyable_v<Expected> && ...), "a kernel's arguments are copied as bytes");
  static_assert((sizeof(Expected) + ... + 0) <= 4096, "a kernel's arguments are of 4096 bytes at most");
  auto call = [kernel, arguments = std::tuple<Expected...>(std::forward<Actual>(actual)...)] {
    std::apply(kernel, arguments);
  };
  return cuda_host::launch(
      *config, reinterpret_cast<const void*>(kernel), [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}
