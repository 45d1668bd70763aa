#include "excitation.h"

namespace se_ext::cuda {
namespace {

at::Tensor ready(const OptionalTensor& t) {
  return t.has_value() ? aligned(t->contiguous()) : at::Tensor();
}

Layer layer_of(const at::Tensor& w, const at::Tensor& b, Activation activation) {
  return {dtype_of(w), w.const_data_ptr(), data(b), w.size(0), w.size(1), activation};
}

}  // namespace

Excitation::Excitation(const ops::Excitation& e, const ops::Activations& activations)
    : w1_(ready(e.w1)),
      b1_(ready(e.b1)),
      w2_(ready(e.w2)),
      b2_(ready(e.b2)),
      first_(layer_of(w1_, b1_, activations.activation)),
      second_(layer_of(w2_, b2_, activations.gate)) {}

void Excitation::forward(const Forward& v, std::int64_t first, std::int64_t samples, cudaStream_t stream) const {
  C10_CUDA_CHECK(layer_forward(first_, {v.z, v.hidden, v.h}, first, samples, stream));
  C10_CUDA_CHECK(layer_forward(second_, {v.h, nullptr, v.scale}, first, samples, stream));
}

void Excitation::backward(const Backward& v, std::int64_t first, std::int64_t samples, cudaStream_t stream) const {
  Layer second = second_, before = first_;
  second.activation = first_.activation;  // the one that stands before the second layer
  C10_CUDA_CHECK(layer_backward(second, {v.grad_t, v.hidden, v.h, v.grad_hidden, 1}, first, samples, stream));
  C10_CUDA_CHECK(layer_backward(before, {v.grad_hidden, nullptr, nullptr, v.grad_z, static_cast<double>(v.points)},
                                first, samples, stream));
}

void Excitation::weight_gradients(const WeightGradients& to, const Backward& v, const void* z, std::int64_t samples,
                                  cudaStream_t stream) const {
  C10_CUDA_CHECK(layer_gradients(first_, v.grad_hidden, z, samples, writable(to.w1), writable(to.b1), stream));
  C10_CUDA_CHECK(layer_gradients(second_, v.grad_t, v.h, samples, writable(to.w2), writable(to.b2), stream));
}

}  // namespace se_ext::cuda
