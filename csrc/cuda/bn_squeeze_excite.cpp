// The block behind a batch normalisation (or a given affine map) and an activation: u = pre(a ⊙ x + b) takes the place
// of x; it is not a tensor that anybody keeps.
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "excitation.h"
#include "normalization.h"
#include "plan.h"

namespace se_ext::cuda {
namespace {

using at::Tensor;
using checks::OptionalTensor;

constexpr const char* kOp = "bn_squeeze_excite";

// What forward leaves for backward, besides what the caller has.
struct Saved {
  BatchStatistics statistics;  // sample_means of no rows where pre is not the identity
  Tensor z, hidden, scale;     // as in squeeze_excite; scale without drop_scale
};

struct Options {
  Activation pre, post;
  bool batch_statistics;
  double eps;
};

void forward(const FeatureMap& x, Vectors& v, const Excitation& e, const OptionalTensor& residual,
             const OptionalTensor& drop_scale, const Options& options, const Tensor& y, const Saved& saved) {
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const auto type = accumulation_type(x.tensor.scalar_type());
  const bool is_identity = options.pre == Activation::Identity, is_double = type == at::kDouble;
  const Tensor r = beside(x, residual), drop = vector_in(drop_scale, type);
  const int maps = r.defined() ? 3 : 2;
  const Batch batch = batch_of(x, is_streaming(x, maps));
  const std::int64_t partials = partial_items(batch, N, 1);
  Scratch scratch(partials + 2 * C + N * M, 4, x.tensor.options().dtype(type));
  void* const a = scratch.take(C);
  void* const b = scratch.take(C);
  void* const partials_at = scratch.take(partials);
  void* const h = scratch.take(N * M);
  if (options.batch_statistics) {
    statistics_of_batch(x, v, options.eps, saved.statistics, a, b);
  } else {
    C10_CUDA_CHECK(coefficients(v.of(x), is_double, a, b, batch.stream));
  }

  const Prologue prologue{a, b, options.pre};
  const RescaleMaps out{data(x.tensor), data(saved.scale), data(r), writable(y), options.post};
  const Plan plan = Plan::of({x.dtype, x.slab, N, 1, maps - 1, M, e.weight_bytes(), !is_identity}, current_device());
  if (plan.path == Path::Cluster) {
    const Block block{e.first(), e.second(), writable(saved.z), writable(saved.hidden), writable(saved.scale)};
    C10_CUDA_CHECK(write_block(batch, plan.cluster, block, out, &prologue, data(drop)));
    return;
  }
  const auto points = static_cast<double>(x.slab.points);
  if (is_identity) {
    const Tensor& means = saved.statistics.sample_means;
    if (!options.batch_statistics) C10_CUDA_CHECK(sum_input(batch, out.x, {writable(means), partials_at, points}));
    C10_CUDA_CHECK(squeeze_from_means(v.of(x), is_double, data(means), writable(saved.z), batch.stream));
  }
  for_each_chunk(batch, is_identity ? N : plan.chunk, [&](const Batch& part) {
    if (!is_identity) C10_CUDA_CHECK(sum_prologue(part, out.x, prologue, {writable(saved.z), partials_at, points}));
    e.forward({data(saved.z), writable(saved.hidden), h, writable(saved.scale)}, part.first, part.samples, part.stream);
    C10_CUDA_CHECK(write_prologue_rescale(part, prologue, data(drop), out));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  checks::bn_squeeze_excite(kOp, input, {weight, bias, batch_statistics, pre_activation},
                            {w1, b1, w2, b2, activation, gate}, residual, post_activation, drop_scale);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(kOp, "activation", activation), parse_gate(kOp, gate));
  const Options options{parse_activation(kOp, "pre_activation", pre_activation),
                        parse_activation(kOp, "post_activation", post_activation), batch_statistics, eps};
  const auto type = accumulation_type(input.scalar_type());
  Vectors v(weight, bias, type);
  const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
    return empty_matrix(rows, columns, x.tensor, type);
  };
  const Saved saved{BatchStatistics::empty(x, type, batch_statistics, options.pre == Activation::Identity),
                    matrix(x.samples, e.channels()), matrix(x.samples, e.hidden_channels()),
                    matrix(x.samples, e.channels())};
  Tensor y = empty_map_like(x.tensor);
  forward(x, v, e, residual, drop_scale, options, y, saved);
  const auto& [mean, var, inverse, sample_means] = saved.statistics;
  return {y, mean, var, inverse, sample_means, saved.z, saved.hidden, saved.scale};
}

std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  auto all = bn_squeeze_excite_forward(input, weight, bias, w1, b1, w2, b2, batch_statistics, eps, pre_activation,
                                       activation, gate, residual, post_activation, drop_scale);
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all)};
}

// (grad_input, grad_weight, grad_bias, grad_w1, grad_b1, grad_w2, grad_b2, grad_residual), those that the mask asks
// for.
//
// One pass sums up what the gradient of the scale and the normalisation need, another writes. It waits for the whole
// batch where the batch's statistics depend on x.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, const Tensor& mean,
    const Tensor& inverse, const Tensor& sample_means_, const Tensor& z_, const Tensor& hidden_, const Tensor& scale_,
    const OptionalTensor& saved, const OptionalTensor& drop_scale, bool batch_statistics, double /*eps*/,
    std::string_view pre_activation, std::string_view activation, std::string_view gate,
    std::string_view post_activation, std::array<bool, 8> mask) {
  checks::bn_squeeze_excite_backward(grad_output, input, {weight, bias, batch_statistics, pre_activation},
                                     {w1, b1, w2, b2, activation, gate}, {mean, inverse, sample_means_},
                                     {z_, hidden_, scale_}, saved, post_activation, drop_scale);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(kOp, "activation", activation), parse_gate(kOp, gate));
  const Activation pre = parse_activation(kOp, "pre_activation", pre_activation);
  const Activation post = parse_activation(kOp, "post_activation", post_activation);
  const bool is_identity = pre == Activation::Identity;
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const auto type = accumulation_type(input.scalar_type());
  const bool is_double = type == at::kDouble;
  Vectors v(weight, bias, type);
  if (batch_statistics) {
    v.mean = vector_in(mean, type);
    v.inverse = vector_in(inverse, type);
  }
  const Normalization norm = v.of(x);
  const Tensor g = beside(x, grad_output), kept = beside(x, saved), drop = vector_in(drop_scale, type);
  const Tensor z = vector_in(z_, type), hidden = vector_in(hidden_, type), scale = vector_in(scale_, type);
  const Tensor sample_means = vector_in(sample_means_, type);
  const Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  const Tensor grad_residual = mask[7] ? empty_map_like(x.tensor) : Tensor();

  const bool writes = mask[0] || mask[7];
  const bool needs_totals = batch_statistics ? mask[0] || mask[1] || mask[2] : mask[1] || mask[2];
  const int read = kept.defined() ? 3 : 2, written = mask[0] + mask[7], parts = is_identity ? 2 : 5;
  const Batch batch = batch_of(x, is_streaming(x, read + written));
  const std::int64_t partials = partial_items(batch, N, parts);
  Scratch scratch(partials + 2 * N * M + (2 + parts) * N * C + 6 * C, 12, x.tensor.options().dtype(type));
  const Sums sums{scratch.take(parts * N * C), scratch.take(partials), 1};
  void* const grad_t = scratch.take(N * C);
  void* const grad_z = scratch.take(N * C);
  void* const h = scratch.take(N * M);
  void* const grad_hidden = scratch.take(N * M);
  void* const a = scratch.take(C);
  void* const b = scratch.take(C);
  void* const slope = scratch.take(C);
  void* const offset = scratch.take(C);
  void* const grad_weight = scratch.take(C);
  void* const grad_bias = scratch.take(C);
  C10_CUDA_CHECK(coefficients(norm, is_double, a, b, batch.stream));

  const Excitation::Backward vectors{grad_t, data(hidden), h, grad_hidden, grad_z, x.slab.points};
  const RescaleBackward maps{
      data(g), data(x.tensor), data(scale), data(kept), grad_z, writable(grad_input), writable(grad_residual), post};
  const PrologueBackward prologue{
      {a, b, pre}, data(drop), norm.mean, batch_statistics ? slope : nullptr, batch_statistics ? offset : nullptr};
  const ScaleGradient scale_sums{sums.sums, data(scale), data(drop), grad_t, e.gate(), !is_identity};
  const Plan plan = Plan::of({x.dtype, x.slab, N, read, written, M, e.weight_bytes(), false}, current_device());
  for_each_chunk(batch, batch_statistics ? N : plan.chunk, [&](const Batch& part) {
    C10_CUDA_CHECK(sum_prologue_backward(part, prologue, maps, sums));
    C10_CUDA_CHECK(scale_gradient(norm, is_double, scale_sums, part.first, part.samples, part.stream));
    e.backward(vectors, part.first, part.samples, part.stream);
    if (writes && !batch_statistics) C10_CUDA_CHECK(write_prologue_backward(part, prologue, maps));
  });
  Tensor weight_gradient, bias_gradient;
  if (needs_totals) {
    const auto fresh = [&] { return at::empty({C}, input.options().dtype(type)); };
    if (mask[1]) weight_gradient = fresh();
    if (mask[2]) bias_gradient = fresh();
    C10_CUDA_CHECK(batch_backward(norm, is_double,
                                  {sums.sums, data(scale), data(drop), grad_z, data(sample_means), !is_identity,
                                   mask[1] ? writable(weight_gradient) : grad_weight,
                                   mask[2] ? writable(bias_gradient) : grad_bias, slope, offset},
                                  batch.stream));
    if (mask[1]) weight_gradient = vector_gradient(x, weight, weight_gradient);
    if (mask[2]) bias_gradient = vector_gradient(x, bias, bias_gradient);
  }
  if (writes && batch_statistics) C10_CUDA_CHECK(write_prologue_backward(batch, prologue, maps));
  const Excitation::Gradients grads =
      e.gradients({mask[3], mask[4], mask[5], mask[6]}, vectors, data(z), N, batch.stream);
  return {grad_input, weight_gradient, bias_gradient, grads.w1, grads.b1, grads.w2, grads.b2, grad_residual};
}

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  m.impl("bn_squeeze_excite", bn_squeeze_excite);
  m.impl("_bn_squeeze_excite_forward", bn_squeeze_excite_forward);
  m.impl("_bn_squeeze_excite_backward", bn_squeeze_excite_backward);
}

}  // namespace
}  // namespace se_ext::cuda
