#include <ATen/ops/empty_like.h>

#include "excitation.h"

namespace se_ext {

template <>
void Backend<Cuda>::excite(const ops::Excite& a, const ops::Activations& activations, const Tensor& scale,
                           const Tensor& hidden) {
  using namespace cuda;
  const cuda::Excitation e(a.excitation, activations);
  const auto type = accumulation_type(a.input.scalar_type());
  const Tensor z = vector_in(a.input, type);
  const Tensor h = at::empty_like(hidden);
  const InType s(scale, type);
  e.forward({data(z), writable(hidden), writable(h), writable(s.tensor)}, 0, z.size(0),
            c10::cuda::getCurrentCUDAStream().stream());
  s.write_back();
}

template <>
void Backend<Cuda>::excite_backward(const ops::ExciteBackward& a, const ops::Activations& activations,
                                    const Gradients<5>& to) {
  using namespace cuda;
  const cuda::Excitation e(a.forward.excitation, activations);
  const auto type = accumulation_type(a.forward.input.scalar_type());
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const Tensor z = vector_in(a.forward.input, type), grad = vector_in(a.grad_output, type);
  const Tensor scale = vector_in(a.saved.scale, type), hidden = vector_in(a.saved.hidden, type);
  const Tensor h = at::empty_like(hidden), grad_hidden = at::empty_like(hidden), grad_t = at::empty_like(z);
  const auto& [grad_z, grad_w1, grad_b1, grad_w2, grad_b2] = to;
  const InType gz(grad_z.defined() ? grad_z : at::empty_like(z), type);
  C10_CUDA_CHECK(
      gate_gradient(e.gate(), type == at::kDouble, data(grad), data(scale), writable(grad_t), 0, z.numel(), stream));
  const cuda::Excitation::Backward vectors{data(grad_t),          data(hidden),        writable(h),
                                           writable(grad_hidden), writable(gz.tensor), 1};
  e.backward(vectors, 0, z.size(0), stream);
  e.weight_gradients({grad_w1, grad_b1, grad_w2, grad_b2}, vectors, data(z), z.size(0), stream);
  gz.write_back();
}

}  // namespace se_ext
