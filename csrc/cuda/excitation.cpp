#include "excitation.h"

namespace se_ext::cuda {
namespace {

at::Tensor ready(const checks::OptionalTensor& t) {
  return t.has_value() ? aligned(t->contiguous()) : at::Tensor();
}

Layer layer_of(const at::Tensor& w, const at::Tensor& b, Activation activation) {
  return {dtype_of(w), w.const_data_ptr(), data(b), w.size(0), w.size(1), activation};
}

}  // namespace

Excitation::Excitation(const at::Tensor& w1, const checks::OptionalTensor& b1, const at::Tensor& w2,
                       const checks::OptionalTensor& b2, Activation activation, Activation gate)
    : w1_(ready(w1)),
      b1_(ready(b1)),
      w2_(ready(w2)),
      b2_(ready(b2)),
      first_(layer_of(w1_, b1_, activation)),
      second_(layer_of(w2_, b2_, gate)) {}

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

Excitation::Gradients Excitation::gradients(std::array<bool, 4> wanted, const Backward& v, const void* z,
                                            std::int64_t samples, cudaStream_t stream) const {
  const auto fresh = [](const at::Tensor& w, bool want) {
    return want && w.defined() ? at::empty(w.sizes(), w.options()) : at::Tensor();
  };
  Gradients g{fresh(w1_, wanted[0]), fresh(b1_, wanted[1]), fresh(w2_, wanted[2]), fresh(b2_, wanted[3])};
  C10_CUDA_CHECK(layer_gradients(first_, v.grad_hidden, z, samples, writable(g.w1), writable(g.b1), stream));
  C10_CUDA_CHECK(layer_gradients(second_, v.grad_t, v.h, samples, writable(g.w2), writable(g.b2), stream));
  return g;
}

}  // namespace se_ext::cuda
