#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "excitation.h"

namespace se_ext::cuda {
namespace {

using at::Tensor;
using checks::OptionalTensor;

// (s in z's dtype, hidden [N, M] for backward)
std::tuple<Tensor, Tensor> excite_forward(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                                          const OptionalTensor& b2, std::string_view activation,
                                          std::string_view gate) {
  checks::excite(z, {w1, b1, w2, b2, activation, gate});
  const c10::cuda::CUDAGuard guard(z.device());
  const Excitation e(w1, b1, w2, b2, parse_activation("excite", "activation", activation), parse_gate("excite", gate));
  const auto type = accumulation_type(z.scalar_type());
  const Tensor in = vector_in(z, type);
  const Tensor hidden = empty_matrix(z.size(0), e.hidden_channels(), z, type);
  const Tensor h = at::empty_like(hidden), scale = at::empty_like(in);
  e.forward({data(in), writable(hidden), writable(h), writable(scale)}, 0, z.size(0),
            c10::cuda::getCurrentCUDAStream().stream());
  return {scale.to(z.scalar_type()), hidden};
}

Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  return std::get<0>(excite_forward(z, w1, b1, w2, b2, activation, gate));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(const Tensor& grad_output, const Tensor& z,
                                                                   const Tensor& w1, const OptionalTensor& b1,
                                                                   const Tensor& w2, const OptionalTensor& b2,
                                                                   const Tensor& hidden_, const Tensor& scale,
                                                                   std::string_view activation, std::string_view gate,
                                                                   std::array<bool, 5> mask) {
  checks::excite_backward(grad_output, z, {w1, b1, w2, b2, activation, gate}, hidden_, scale);
  const auto type = accumulation_type(z.scalar_type());
  const c10::cuda::CUDAGuard guard(z.device());
  const Excitation e(w1, b1, w2, b2, parse_activation("excite", "activation", activation), parse_gate("excite", gate));
  const std::int64_t N = z.size(0);
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const Tensor in = vector_in(z, type), s = vector_in(scale, type), hidden = vector_in(hidden_, type);
  const Tensor grad = vector_in(grad_output, type);
  const Tensor h = at::empty_like(hidden), grad_hidden = at::empty_like(hidden);
  const Tensor grad_t = at::empty_like(in), grad_z = at::empty_like(in);
  C10_CUDA_CHECK(
      through_gate(e.gate(), type == at::kDouble, data(grad), data(s), writable(grad_t), 0, in.numel(), stream));
  const Excitation::Backward vectors{data(grad_t),          data(hidden),     writable(h),
                                     writable(grad_hidden), writable(grad_z), 1};
  e.backward(vectors, 0, N, stream);
  const Excitation::Gradients g = e.gradients({mask[1], mask[2], mask[3], mask[4]}, vectors, data(in), N, stream);
  return {mask[0] ? grad_z.to(z.scalar_type()) : Tensor(), g.w1, g.b1, g.w2, g.b2};
}

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  m.impl("excite", excite);
  m.impl("_excite_forward", excite_forward);
  m.impl("_excite_backward", excite_backward);
}

}  // namespace
}  // namespace se_ext::cuda
