// Instantiates the kernels of the depthwise convolution for one instruction set, as ../table.h does the others.
#pragma once

#include "blocks.h"
#include "convolve.h"
#include "gradient.h"
#include "kernels.h"

namespace se_ext::cpu::SE_EXT_ISA {

template <class T>
constexpr DepthwiseKernels depthwise_kernels_of() {
  using A = acc_t<T>;
  return {convolve<T>,  std::is_same_v<T, A> ? convolve_block<A> : nullptr,
          gradient<T>,  rows_at_once,
          to_blocks<T>, from_blocks<T>,
          kLanes<A>};
}

const DepthwiseTable& depthwise_table() {
  // In the order of DType.
  static constexpr DepthwiseTable kTable = {{depthwise_kernels_of<float>(), depthwise_kernels_of<double>(),
                                             depthwise_kernels_of<bfloat16>(), depthwise_kernels_of<float16>()}};
  return kTable;
}

}  // namespace se_ext::cpu::SE_EXT_ISA
