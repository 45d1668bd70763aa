// The whole block, by the path that plan.cpp chooses.
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "excitation.h"
#include "plan.h"

namespace se_ext::cuda {
namespace {

using at::Tensor;
using checks::OptionalTensor;

// What forward leaves for backward: z [N, C], hidden [N, M], scale [N, C], in the accumulation type.
struct Small {
  Tensor z, hidden, scale;
};

// y = post(s ⊙ x + residual), y in x's layout; y may be x. Fills `small` where somebody wants it.
void forward(const FeatureMap& x, const Excitation& e, const OptionalTensor& residual, Activation post, const Tensor& y,
             const Small* small) {
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const auto options = x.tensor.options().dtype(accumulation_type(x.tensor.scalar_type()));
  const Tensor r = beside(x, residual);
  const int maps = r.defined() ? 3 : 2;
  const Batch batch = batch_of(x, is_streaming(x, maps));
  const Plan plan = Plan::of({x.dtype, x.slab, N, 1, maps - 1, M, e.weight_bytes(), true}, current_device());
  RescaleMaps out{data(x.tensor), nullptr, data(r), writable(y), post};
  if (plan.path == Path::Cluster) {
    const Block block{e.first(), e.second(), small ? writable(small->z) : nullptr,
                      small ? writable(small->hidden) : nullptr, small ? writable(small->scale) : nullptr};
    C10_CUDA_CHECK(write_block(batch, plan.cluster, block, out, nullptr, nullptr));
    return;
  }
  const std::int64_t partials = partial_items(batch, N, 1);
  Scratch scratch(partials + N * M + (small ? 0 : N * 2 * C), 4, options);
  void* const partials_at = scratch.take(partials);
  void* const h = scratch.take(N * M);
  void* const z = small ? writable(small->z) : scratch.take(N * C);
  void* const scale = small ? writable(small->scale) : scratch.take(N * C);
  const Sums sums{z, partials_at, static_cast<double>(x.slab.points)};
  out.scale = scale;
  for_each_chunk(batch, plan.chunk, [&](const Batch& part) {
    C10_CUDA_CHECK(sum_input(part, out.x, sums));
    e.forward({z, small ? writable(small->hidden) : nullptr, h, scale}, part.first, part.samples, part.stream);
    C10_CUDA_CHECK(write_rescale(part, out));
  });
}

// (y, z, hidden, scale): what backward needs besides the inputs.
std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_forward(const Tensor& input, const Tensor& w1,
                                                                  const OptionalTensor& b1, const Tensor& w2,
                                                                  const OptionalTensor& b2, std::string_view activation,
                                                                  std::string_view gate, const OptionalTensor& residual,
                                                                  std::string_view post_activation) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite(op, input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  const auto type = accumulation_type(input.scalar_type());
  Small small{empty_matrix(x.samples, e.channels(), x.tensor, type),
              empty_matrix(x.samples, e.hidden_channels(), x.tensor, type),
              empty_matrix(x.samples, e.channels(), x.tensor, type)};
  Tensor y = empty_map_like(x.tensor);
  forward(x, e, residual, parse_activation(op, "post_activation", post_activation), y, &small);
  return {y, small.z, small.hidden, small.scale};
}

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite(op, input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  Tensor y = empty_map_like(x.tensor);
  forward(x, e, residual, parse_activation(op, "post_activation", post_activation), y, nullptr);
  return y;
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                     const OptionalTensor& residual, std::string_view post_activation) {
  const char* op = "squeeze_excite_";
  checks::squeeze_excite_in_place(input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  forward(x, e, residual, parse_activation(op, "post_activation", post_activation), x.tensor, nullptr);
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

// (grad_input, grad_w1, grad_b1, grad_w2, grad_b2, grad_residual), those that the mask asks for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const Tensor& z_, const Tensor& hidden_, const Tensor& scale_,
    const OptionalTensor& saved, std::string_view activation, std::string_view gate, std::string_view post_activation,
    std::array<bool, 6> mask) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite_backward(grad_output, input, {w1, b1, w2, b2, activation, gate}, {z_, hidden_, scale_}, saved,
                                  post_activation);
  const auto type = accumulation_type(input.scalar_type());
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const Tensor g = beside(x, grad_output), kept = beside(x, saved);
  const Tensor z = vector_in(z_, type), hidden = vector_in(hidden_, type), scale = vector_in(scale_, type);
  const Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  const Tensor grad_residual = mask[5] ? empty_map_like(x.tensor) : Tensor();

  const int read = kept.defined() ? 3 : 2, written = mask[0] + mask[5];
  const Batch batch = batch_of(x, is_streaming(x, read + written));
  const std::int64_t partials = partial_items(batch, N, 1);
  Scratch scratch(partials + 2 * N * M + 3 * N * C, 6, x.tensor.options().dtype(type));
  const Sums sums{scratch.take(N * C), scratch.take(partials), 1};
  void* const grad_t = scratch.take(N * C);
  void* const grad_z = scratch.take(N * C);
  void* const h = scratch.take(N * M);
  void* const grad_hidden = scratch.take(N * M);
  const Excitation::Backward vectors{grad_t, data(hidden), h, grad_hidden, grad_z, x.slab.points};
  const RescaleBackward maps{data(g),
                             data(x.tensor),
                             data(scale),
                             data(kept),
                             grad_z,
                             writable(grad_input),
                             writable(grad_residual),
                             parse_activation(op, "post_activation", post_activation)};
  const Plan plan = Plan::of({x.dtype, x.slab, N, read, written, M, e.weight_bytes(), false}, current_device());
  for_each_chunk(batch, plan.chunk, [&](const Batch& part) {
    C10_CUDA_CHECK(sum_rescale_backward(part, maps, sums));
    C10_CUDA_CHECK(through_gate(e.gate(), type == at::kDouble, sums.sums, data(scale), grad_t, part.first * C,
                                part.samples * C, part.stream));
    e.backward(vectors, part.first, part.samples, part.stream);
    if (mask[0] || mask[5]) C10_CUDA_CHECK(write_rescale_backward(part, maps));
  });
  const Excitation::Gradients grads =
      e.gradients({mask[1], mask[2], mask[3], mask[4]}, vectors, data(z), N, batch.stream);
  return {grad_input, grads.w1, grads.b1, grads.w2, grads.b2, grad_residual};
}

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  m.impl("squeeze_excite", squeeze_excite);
  m.impl("squeeze_excite_", squeeze_excite_);
  m.impl("_squeeze_excite_forward", squeeze_excite_forward);
  m.impl("_squeeze_excite_backward", squeeze_excite_backward);
}

}  // namespace
}  // namespace se_ext::cuda
