// The formula in plain ATen operators. It serves what the kernels do not: double backward, forward-mode AD, the
// torch.func transforms, and devices without kernels. The functions check their arguments, differentiate through ATen's
// own autograd, and return what the op of these arguments returns.
#pragma once

#include <array>
#include <tuple>

#include "../ops/ops.h"

namespace se_ext::formula {

Tensor compute(const ops::Squeeze& a);
Tensor compute(const ops::Excite& a);
Tensor compute(const ops::Rescale& a);
Tensor compute(const ops::SqueezeExcite& a);
std::tuple<Tensor, Tensor, Tensor> compute(const ops::BnSqueezeExcite& a);
std::tuple<Tensor, Tensor, Tensor, Tensor> compute(const ops::BnActivation& a);
Tensor compute(const ops::DepthwiseConv& a);

// The backward ops, differentiable in every argument of forward. What forward saved of the small tensors is computed
// anew, as a function of the inputs, or second derivatives would miss the paths through it.
std::array<Tensor, 5> compute(const ops::ExciteBackward& a);
std::array<Tensor, 3> compute(const ops::RescaleBackward& a);
std::array<Tensor, 6> compute(const ops::SqueezeExciteBackward& a);
std::array<Tensor, 8> compute(const ops::BnSqueezeExciteBackward& a);
std::array<Tensor, 4> compute(const ops::BnActivationBackward& a);
std::array<Tensor, 3> compute(const ops::DepthwiseConvBackward& a);

}  // namespace se_ext::formula
