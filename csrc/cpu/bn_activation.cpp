// A batch normalisation, a shortcut and an activation without a block behind them:
// y = activation(drop_scale ⊙ (a ⊙ x + b) + residual).
#include "folded_map.h"
#include "normalization.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext {
namespace cpu {
namespace {

// a and b of each sample, its drop_scale in them; without one, those of the batch.
class SampleCoefficients {
 public:
  SampleCoefficients(const FoldedMap& x, const OptionalTensor& drop_scale, const Vectors& v)
      : x_(x), vectors_(v.kernels()), drop_(Vectors::in_type(drop_scale, v.type)), drop_at_(pointer(drop_)) {}

  bool are_dropped() const { return drop_.defined(); }
  std::int64_t scratch_items() const { return 2 * (1 + rows()) * x_.slab.channels; }
  static constexpr int kPieces = 4;  // of the scratch memory
  void compute(const Normalization& norm, Scratch& scratch) {
    const std::int64_t C = x_.slab.channels;
    const Pointer a = scratch.take(C), b = scratch.take(C);
    a_at_ = scratch.take(rows() * C);
    b_at_ = scratch.take(rows() * C);
    vectors_.coefficients(norm, a.base, b.base);
    x_.repeat(a.base, a_at_);
    x_.repeat(b.base, b_at_);
    // From the last sample to the first, in whose place the batch's are.
    for (std::int64_t n = x_.samples - 1; are_dropped() && n >= 0; --n) {
      vectors_.product(C, a_at_.base, drop_at_.at(n), nullptr, a_at_.at(n * C));
      vectors_.product(C, b_at_.base, drop_at_.at(n), nullptr, b_at_.at(n * C));
    }
  }
  void* a(std::int64_t n) const { return a_at_.at(are_dropped() ? n * x_.slab.channels : 0); }
  void* b(std::int64_t n) const { return b_at_.at(are_dropped() ? n * x_.slab.channels : 0); }
  void* drop(std::int64_t n) const { return drop_at_.at(n); }

 private:
  std::int64_t rows() const { return are_dropped() ? std::max<std::int64_t>(1, x_.samples) : 1; }

  const FoldedMap& x_;
  const NormKernels& vectors_;
  const at::Tensor drop_;
  const Pointer drop_at_;
  Pointer a_at_, b_at_;
};

}  // namespace
}  // namespace cpu

template <>
void Backend<Cpu>::bn_activation(const ops::BnActivation& a, const ops::Activations& activations, const Tensor& y,
                                 const Statistics& statistics) {
  using namespace cpu;
  const FeatureMap map_of_batch(a.input);
  const MapOutput out(map_of_batch, a.input, y);
  const FoldedMap x(map_of_batch);
  const std::int64_t slab = x.slab_elements();
  Vectors v(a.norm(), x.accumulation_type());
  if (a.batch_statistics) statistics_of_batch(map_of_batch, v, a.eps, statistics, /*sample_means=*/Tensor());
  const Tensor residual = x.in_my_layout(a.residual);

  SampleCoefficients coefficients(x, a.drop_scale, v);
  Scratch scratch(coefficients.scratch_items(), SampleCoefficients::kPieces, x.accumulation_options());
  coefficients.compute(v.of(map_of_batch), scratch);
  const Pointer residual_at = pointer(residual), y_at(out.tensor);
  const Schedule schedule = Schedule::of(x, residual.defined() ? 3 : 2, 0);
  const bool streaming = schedule.streaming && !out.is_input();
  const Tiles tiles(x);
  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  schedule.run_backwards(x.samples, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(x.slab, tile,
                  {{x.sample(n), coefficients.a(n), coefficients.b(n), Activation::Identity},
                   /*scale=*/nullptr,
                   residual_at.at(n * slab),
                   y_at.at(n * slab),
                   activations.post,
                   streaming});
    });
  });
  out.write_back();
}

// One pass sums up what the normalisation's gradient needs, another writes. Without a residual, the slope of the
// activation is taken from x, anew in each pass: y is not read.
template <>
void Backend<Cpu>::bn_activation_backward(const ops::BnActivationBackward& a, const ops::Activations& activations,
                                          const Gradients<4>& to) {
  using namespace cpu;
  const FeatureMap map_of_batch(a.forward.input);
  const FoldedMap x(map_of_batch);
  const auto& [grad_input, grad_weight, grad_bias, grad_residual] = to;
  const bool batch_statistics = a.forward.batch_statistics;
  const std::int64_t N = x.samples, C = x.slab.channels, slab = x.slab_elements();
  Vectors v(a.forward.norm(), x.accumulation_type());
  if (batch_statistics) v.use(a.saved);
  const Normalization norm = v.of(map_of_batch);
  const Tensor g = x.in_my_layout(a.grad_output), saved = x.in_my_layout(a.forward.residual);

  const Schedule schedule = Schedule::of(x, saved.defined() ? 4 : 3, 0);
  Reduction tiles(x, schedule, 2);
  SampleCoefficients coefficients(x, a.forward.drop_scale, v);
  Scratch scratch(tiles.scratch_items() + coefficients.scratch_items() + (2 * N + 10) * C,
                  9 + SampleCoefficients::kPieces, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  coefficients.compute(norm, scratch);
  // Folded, as are the coefficients: [N, 2, fold, C], [2, fold, C], and [fold, C] each.
  const Pointer sums_at = scratch.take(2 * N * C), folded_at = scratch.take(2 * C);
  const Pointer center_at = scratch.take(C), slope_at = scratch.take(C), offset_at = scratch.take(C);
  // Of the channels: [2, C], [C], [2, C].
  const Pointer totals_at = scratch.take(2 * C), grad_weight_at = scratch.take(C), vectors_at = scratch.take(2 * C);
  if (batch_statistics) {
    x.repeat(norm.mean, center_at);
  } else {
    std::memset(center_at.base, 0, C * center_at.item_bytes);
    std::memset(offset_at.base, 0, C * offset_at.item_bytes);
  }

  const bool sums = batch_statistics || grad_weight.defined() || grad_bias.defined();
  // The pass that sums leaves gv for the pass that writes, at full precision, or where a ReLU makes it the gradient or
  // nothing: in the residual's gradient, which it is; without one in the input's, where it saves an expensive slope.
  const bool is_exact = x.tensor.scalar_type() == v.type;
  const bool is_kept_exactly =
      is_exact ? activations.post != Activation::Identity : activations.post == Activation::Relu;
  const bool leaves_in_input =
      sums && grad_input.defined() && !grad_residual.defined() && is_kept_exactly && !is_cheap(activations.post);
  const bool leaves_slopes = leaves_in_input || (sums && grad_residual.defined() && is_kept_exactly);
  const Pointer g_at(g), saved_at = pointer(saved), gx_at = pointer(grad_input);
  const Pointer gv_at = leaves_in_input ? gx_at : pointer(grad_residual);
  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  const auto at_sample = [&](std::int64_t n) {
    return PrologueBackward{{x.sample(n), coefficients.a(n), coefficients.b(n), Activation::Identity},
                            g_at.at(n * slab),
                            /*scale=*/nullptr,
                            saved_at.at(n * slab),
                            /*grad_mean=*/nullptr,
                            center_at.base,
                            coefficients.a(n),
                            batch_statistics ? slope_at.base : nullptr,
                            offset_at.base,
                            gx_at.at(n * slab),
                            gv_at.at(n * slab),
                            activations.post,
                            schedule.streaming && !leaves_in_input,  // what was just read is in cache
                            leaves_slopes};
  };
  if (sums) {
    schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
      tiles.reduce(team, index, first, samples, 1, sums_at,
                   [&](std::int64_t n, Tile tile, void* of_n) { map.backward_sums(x.slab, tile, at_sample(n), of_n); });
      if (!coefficients.are_dropped()) return;
      for_each_sample(team, first, samples, [&](std::int64_t n) {  // of the gradient in front of drop_scale
        void* const of_n = sums_at.at(2 * n * C);
        v.kernels().product(2 * C, of_n, coefficients.drop(n), nullptr, of_n);
      });
    });
    v.sums().sum_samples(N, 2 * C, sums_at.base, folded_at.base);
    for (int part = 0; part < 2; ++part) {
      v.sums().sum_samples(x.fold, x.channels, folded_at.at(part * C), totals_at.at(part * x.channels));
    }
    void *const slope = vectors_at.base, *const offset = vectors_at.at(x.channels);
    v.kernels().backward_coefficients(norm, totals_at.base, grad_weight_at.base, slope, offset);
    if (batch_statistics) {
      x.repeat(slope, slope_at);
      x.repeat(offset, offset_at);
    }
    write_gradient(x, grad_weight_at, grad_weight);
    write_gradient(x, totals_at, grad_bias);
  }
  if (grad_input.defined() || (grad_residual.defined() && !leaves_slopes)) {
    schedule.run_backwards(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.backward_apply(x.slab, tile, at_sample(n)); });
    });
  }
}

}  // namespace se_ext
