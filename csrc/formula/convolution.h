// The depthwise convolution by ATen's own, for backends that have no kernels for it: in the map's type and layout. (The
// op in the accumulation type is in formula.h, as the others are.)
#pragma once

#include "../ops/ops.h"

namespace se_ext::formula {

Tensor native_convolution(const ops::DepthwiseConv& a);
std::array<Tensor, 3> native_convolution_backward(const ops::DepthwiseConvBackward& a);

}  // namespace se_ext::formula
