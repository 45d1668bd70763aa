// Which instruction set the CPU kernels run in: the widest that the CPU has, or what SE_EXT_CPU_ISA names.
#pragma once

#include "kernels/depthwise/kernels.h"
#include "kernels/kernels.h"

namespace se_ext::cpu {

const KernelTable& kernels();
const DepthwiseKernels& depthwise_kernels(DType type);

}  // namespace se_ext::cpu
