// One kernel launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace se_ext::cuda {

inline unsigned grid_of(std::int64_t blocks) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;  // the kernels take further items in turn
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

template <class... Expected, class... Actual>
cudaError_t launch(void (*kernel)(Expected...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                   cudaStream_t stream, Actual... arguments) {
  if (blocks <= 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_of(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(arguments)...);
}

}  // namespace se_ext::cuda
