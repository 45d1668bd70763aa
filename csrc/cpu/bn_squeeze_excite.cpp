// The block behind a batch normalisation (or a given affine map) and an activation: u = pre(a ⊙ x + b) takes the place
// of x; it is not a tensor that anybody keeps.
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "excitation.h"
#include "normalization.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {
namespace {

using at::Tensor;
using checks::OptionalTensor;

constexpr const char* kOp = "bn_squeeze_excite";

// What forward leaves for backward, besides what the caller has.
struct Saved {
  Statistics statistics;    // sample_means of no rows where pre is not the identity
  Tensor z, hidden, scale;  // as in squeeze_excite; scale without drop_scale
};

struct Options {
  Activation pre, post;
  bool batch_statistics;
  double eps;
};

void forward(const FeatureMap& x, Vectors& v, const Excitation& e, const OptionalTensor& residual,
             const OptionalTensor& drop_scale, const Options& options, const Tensor& y, const Saved& saved) {
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels(), slab = x.slab_elements();
  const bool is_identity = options.pre == Activation::Identity;
  // An expensive u is kept in y between the two passes, where y is as precise as u.
  const bool keeps_u = !is_cheap(options.pre) && x.tensor.scalar_type() == v.type && !y.is_same(x.tensor);
  if (options.batch_statistics) statistics_of_batch(x, v, options.eps, saved.statistics);
  const Normalization norm = v.of(x);
  const NormKernels& vectors = v.kernels();
  const Tensor r = residual.has_value() ? x.in_my_layout(*residual) : Tensor();
  const Tensor drop = Vectors::in_type(drop_scale, v.type);

  const Schedule schedule = Schedule::of(x, r.defined() ? 3 : 2, e.weight_bytes());
  Reduction tiles(x, schedule, v.type);
  Scratch scratch(tiles.scratch_items() + N * M + 2 * C + 2 * N * C, 6, x.tensor.options().dtype(v.type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M), a_at = scratch.take(C), b_at = scratch.take(C);
  // Where pre is the identity, the scale goes into a and b; else only drop_scale goes into the scale.
  const Pointer sa_at = scratch.take(N * C), sb_at = scratch.take(N * C);
  const Pointer z_at(saved.z), hidden_at(saved.hidden), scale_at(saved.scale);
  const Pointer means_at(saved.statistics.sample_means);
  const Pointer r_at = pointer(r), y_at(y), drop_at = pointer(drop);
  vectors.coefficients(norm, a_at.base, b_at.base);

  const bool streaming = schedule.streaming && !y.is_same(x.tensor);
  const MapKernels& plain = kernels().map[static_cast<int>(x.dtype)];
  const AffineKernels& map = kernels().affine[static_cast<int>(x.dtype)];
  const auto block = [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    if (is_identity) {
      if (!options.batch_statistics) {
        tiles.reduce(team, index, first, samples, x.slab.points, means_at,
                     [&](std::int64_t n, Tile tile, void* sums) { plain.squeeze(x.slab, tile, x.sample(n), sums); });
      }
      for_each_sample(team, first, samples,
                      [&](std::int64_t n) { vectors.squeeze_from_mean(norm, means_at.at(n * C), z_at.at(n * C)); });
    } else {
      tiles.reduce(team, index, first, samples, x.slab.points, z_at, [&](std::int64_t n, Tile tile, void* sums) {
        map.squeeze(x.slab, tile, {x.sample(n), a_at.base, b_at.base, options.pre},
                    keeps_u ? y_at.at(n * slab) : nullptr, sums);
      });
    }
    e.forward(team, first, samples, z_at, hidden_at, h_at, scale_at);
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      const void* drop_of_n = drop_at.at(n);
      vectors.product(C, scale_at.at(n * C), drop_of_n, is_identity ? a_at.base : nullptr, sa_at.at(n * C));
      if (is_identity) vectors.product(C, scale_at.at(n * C), drop_of_n, b_at.base, sb_at.at(n * C));
    });
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      if (keeps_u) {
        plain.rescale(x.slab, tile,
                      {y_at.at(n * slab), sa_at.at(n * C), r_at.at(n * slab), y_at.at(n * slab), options.post, false});
        return;
      }
      const AffineMap of_n = is_identity ? AffineMap{x.sample(n), sa_at.at(n * C), sb_at.at(n * C), options.pre}
                                         : AffineMap{x.sample(n), a_at.base, b_at.base, options.pre};
      map.rescale(x.slab, tile, {of_n, sa_at.at(n * C), r_at.at(n * slab), y_at.at(n * slab), options.post, streaming});
    });
  };
  if (options.batch_statistics) {
    schedule.run_backwards(N, block);
  } else {
    schedule.run(N, block);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  checks::bn_squeeze_excite(kOp, input, {weight, bias, batch_statistics, pre_activation},
                            {w1, b1, w2, b2, activation, gate}, residual, post_activation, drop_scale);
  const FeatureMap x(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(kOp, "activation", activation), parse_gate(kOp, gate));
  const Options options{parse_activation(kOp, "pre_activation", pre_activation),
                        parse_activation(kOp, "post_activation", post_activation), batch_statistics, eps};
  Vectors v(weight, bias, accumulation_type(input.scalar_type()));
  const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
    return empty_matrix(rows, columns, x.tensor, v.type);
  };
  const Saved saved{Statistics::empty(x, v.type, batch_statistics, options.pre == Activation::Identity),
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
// One pass sums up what the gradient of the scale and the normalisation need (affine.h), another writes. It waits for
// the whole batch where the batch's statistics depend on x.
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
  const FeatureMap x(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(kOp, "activation", activation), parse_gate(kOp, gate));
  const Activation pre = parse_activation(kOp, "pre_activation", pre_activation);
  const Activation post = parse_activation(kOp, "post_activation", post_activation);
  const bool is_identity = pre == Activation::Identity;
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels(), slab = x.slab_elements();
  Vectors v(weight, bias, accumulation_type(input.scalar_type()));
  if (batch_statistics) {
    v.mean = mean.contiguous();
    v.inverse = inverse.contiguous();
  }
  const Normalization norm = v.of(x);
  const NormKernels& vectors = v.kernels();
  const Tensor g = x.in_my_layout(grad_output);
  const Tensor kept = saved.has_value() ? x.in_my_layout(*saved) : Tensor();
  const Tensor z = z_.contiguous(), hidden = hidden_.contiguous(), scale = scale_.contiguous();
  const Tensor sample_means = sample_means_.contiguous();
  const Tensor drop = Vectors::in_type(drop_scale, v.type);

  const bool needs_totals = batch_statistics ? mask[0] || mask[1] || mask[2] : mask[1] || mask[2];
  const Schedule schedule = Schedule::of(x, kept.defined() ? 4 : 3, e.weight_bytes());
  const std::int64_t parts = is_identity ? 2 : 5;
  Reduction tiles(x, schedule, v.type, static_cast<int>(parts));
  Scratch scratch(tiles.scratch_items() + 2 * N * M + (6 + parts) * N * C + (5 + parts) * C, 16,
                  x.tensor.options().dtype(v.type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M), grad_hidden_at = scratch.take(N * M);
  const Pointer grad_t_at = scratch.take(N * C), gz_at = scratch.take(N * C), sums_at = scratch.take(parts * N * C);
  const Pointer eff_at = scratch.take(N * C), offset_at = scratch.take(N * C);
  const Pointer sa_at = scratch.take(N * C), sb_at = scratch.take(N * C);  // as in forward
  const Pointer a_at = scratch.take(C), b_at = scratch.take(C), totals_at = scratch.take(parts * C);
  const Pointer grad_weight_at = scratch.take(C), slope_at = scratch.take(C), batch_offset_at = scratch.take(C);
  vectors.coefficients(norm, a_at.base, b_at.base);
  e.activate(N, Pointer(hidden), h_at);

  Excitation::Gradients grads = e.empty_gradients({mask[3], mask[4], mask[5], mask[6]});
  Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  Tensor grad_residual = mask[7] ? empty_map_like(x.tensor) : Tensor();
  const Pointer g_at(g), s_at(scale), kept_at = pointer(kept), gx_at = pointer(grad_input),
                                      gr_at = pointer(grad_residual), means_at(sample_means), drop_at = pointer(drop);

  // Kept at full precision, or a ReLU's gradient, which is g or nothing. A kept slope multiplies: only where no kink
  // stops a gradient.
  const bool is_exact = x.tensor.scalar_type() == v.type;
  const bool keeps = is_identity ? mask[7] && (is_exact ? post != Activation::Identity : post == Activation::Relu)
                                 : mask[0] && is_exact && !is_cheap(pre) && mask[7] == (post != Activation::Identity);
  const void* slope = batch_statistics ? slope_at.base : nullptr;
  const auto at_sample = [&](std::int64_t n) {
    return AffineBackward{is_identity ? AffineMap{x.sample(n), sa_at.at(n * C), sb_at.at(n * C), pre}
                                      : AffineMap{x.sample(n), a_at.base, b_at.base, pre},
                          g_at.at(n * slab),
                          eff_at.at(n * C),
                          kept_at.at(n * slab),
                          gz_at.at(n * C),
                          batch_statistics ? norm.mean : batch_offset_at.base,  // else it is zeros
                          is_identity ? sa_at.at(n * C) : a_at.base,
                          slope,
                          is_identity ? offset_at.at(n * C) : batch_offset_at.base,
                          gx_at.at(n * slab),
                          gr_at.at(n * slab),
                          post,
                          schedule.streaming,
                          keeps};
  };

  const AffineKernels& map = kernels().affine[static_cast<int>(x.dtype)];
  const auto write = [&](Team team, std::int64_t first, std::int64_t samples) {
    if (is_identity) {
      for_each_sample(team, first, samples, [&](std::int64_t n) {
        vectors.offset_of_sample(C, gz_at.at(n * C), a_at.base, batch_statistics ? batch_offset_at.base : nullptr,
                                 offset_at.at(n * C));
      });
    }
    tiles.apply(team, first, samples,
                [&](std::int64_t n, Tile tile) { map.backward_apply(x.slab, tile, at_sample(n)); });
  };
  const bool writes = mask[0] || (mask[7] && !keeps);
  if (!batch_statistics) std::memset(batch_offset_at.base, 0, C * batch_offset_at.item_bytes);

  schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, s_at.at(n * C), drop_at.at(n), nullptr, eff_at.at(n * C));
      if (is_identity) {
        vectors.product(C, eff_at.at(n * C), nullptr, a_at.base, sa_at.at(n * C));
        vectors.product(C, eff_at.at(n * C), nullptr, b_at.base, sb_at.at(n * C));
      }
    });
    tiles.reduce(team, index, first, samples, 1, sums_at,
                 [&](std::int64_t n, Tile tile, void* to) { map.backward_sums(x.slab, tile, at_sample(n), to); });
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      const void* of_n = sums_at.at(parts * n * C);
      if (is_identity) {
        vectors.scale_gradient(norm, of_n, drop_at.at(n), grad_t_at.at(n * C));
      } else {
        vectors.product(C, of_n, drop_at.at(n), nullptr, grad_t_at.at(n * C));
      }
    });
    e.backward(team, first, samples, x.slab.points, s_at, Pointer(hidden), h_at, grad_t_at, grad_hidden_at, gz_at);
    if (needs_totals) {
      for_each_sample(team, first, samples, [&](std::int64_t n) {
        void* of_n = sums_at.at(parts * n * C);
        if (is_identity) {
          vectors.sums_behind_scale(norm, eff_at.at(n * C), gz_at.at(n * C), means_at.at(n * C), of_n);
        } else {
          vectors.sums_behind_activation(C, eff_at.at(n * C), gz_at.at(n * C), of_n);
        }
      });
    }
    if (writes && !batch_statistics) write(team, first, samples);
  });

  Tensor grad_weight, grad_bias;
  if (needs_totals) {
    v.sums().sum_samples(N, parts * C, sums_at.base, totals_at.base);
    vectors.backward_coefficients(norm, totals_at.base, grad_weight_at.base, slope_at.base, batch_offset_at.base);
    if (mask[1]) grad_weight = vector_gradient(x, weight, grad_weight_at, v.type);
    if (mask[2]) grad_bias = vector_gradient(x, bias, totals_at, v.type);
  }
  if (writes && batch_statistics) {
    schedule.run_backwards(
        N, [&](Team team, int, std::int64_t first, std::int64_t samples) { write(team, first, samples); });
  }
  e.weight_gradients(N, Pointer(z), h_at, grad_t_at, grad_hidden_at, grads);
  return {grad_input, grad_weight, grad_bias, grads.w1, grads.b1, grads.w2, grads.b2, grad_residual};
}

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  m.impl("bn_squeeze_excite", bn_squeeze_excite);
  m.impl("_bn_squeeze_excite_forward", bn_squeeze_excite_forward);
  m.impl("_bn_squeeze_excite_backward", bn_squeeze_excite_backward);
}

}  // namespace
}  // namespace se_ext::cpu
