// ATen's convolution: there is no kernel of ours yet.
#include "../formula/convolution.h"
#include "device.h"

namespace se_ext {

template <>
Tensor Backend<Cuda>::depthwise_conv(const ops::DepthwiseConv& a) {
  return formula::native_convolution(a);
}

template <>
Gradients<3> Backend<Cuda>::depthwise_conv_backward(const ops::DepthwiseConvBackward& a) {
  return formula::native_convolution_backward(a);
}

}  // namespace se_ext
