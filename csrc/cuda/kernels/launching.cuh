// One kernel launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace se_ext::cuda {

// For kernels whose blocks take further items in turn.
inline std::int64_t in_turns(std::int64_t blocks) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  return blocks < kMost ? blocks : kMost;
}

template <class... Expected, class... Actual>
cudaError_t launch(void (*kernel)(Expected...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                   cudaStream_t stream, Actual... arguments) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(arguments)...);
}

}  // namespace se_ext::cuda
