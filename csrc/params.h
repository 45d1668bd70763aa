// Plain types that cross from the adapters into the kernels. No torch type, no function with external linkage.
#pragma once

#include <cstdint>

namespace se_ext {

enum class DType : std::uint8_t { Float32, Float64, BFloat16, Float16 };
inline constexpr int kDTypes = 4;

// Activations and gates share one list; names.cpp says which of them is allowed where.
enum class Activation : std::uint8_t {
  Identity,
  Relu,
  Relu6,
  Silu,
  Gelu,
  Hardswish,
  LeakyRelu,
  Tanh,
  Sigmoid,
  Hardsigmoid,
};

// True where the slope follows from the activation's output, so that backward needs no input: y is saved, or s.
static constexpr bool slope_from_output(Activation a) {
  return a != Activation::Silu && a != Activation::Gelu && a != Activation::Hardswish;
}

// A few instructions, so that a pass with it waits for memory alone.
static constexpr bool is_cheap(Activation a) {
  return a == Activation::Identity || a == Activation::Relu || a == Activation::Relu6 || a == Activation::LeakyRelu;
}

// How one sample's slab lies in memory: ChannelsFirst [C, P], ChannelsLast [P, C].
enum class Layout : std::uint8_t { ChannelsFirst, ChannelsLast };

// One sample's part of a feature map: C channels of P points.
struct Slab {
  std::int64_t channels;
  std::int64_t points;
  Layout layout;
};

// A part of a slab that is contiguous in memory: channels [begin, end) if ChannelsFirst, points if ChannelsLast.
struct Tile {
  std::int64_t begin;
  std::int64_t end;
};

// y = post(scale ⊙ x + residual) on one sample. scale [C] in the accumulation type; residual may be null; y may be x.
struct Rescale {
  const void* x;
  const void* scale;
  const void* residual;
  void* y;
  Activation post;
  bool streaming = false;  // y is too large to be found in cache by who reads it next: write it past the caches
};

// The backward of Rescale on one sample, g = dL/dy. `saved` is y where slope_from_output(post), else the residual;
// null where there was no residual (v = scale ⊙ x is then recomputed).
//   gv = g ⊙ post'(v)     gx = gv ⊙ scale + grad_mean     grad_residual = gv
// grad_mean [C], the gradient that comes back through the squeeze, is already divided by P; zeros where there is none.
struct RescaleBackward {
  const void* grad;
  const void* x;
  const void* scale;
  const void* saved;
  const void* grad_mean;
  void* grad_x;         // null: not wanted
  void* grad_residual;  // null: not wanted
  Activation post;
  bool streaming = false;  // as in Rescale, for grad_x where it is wanted alone
};

// u = pre(a ⊙ x + b) on one sample, a and b [C] in the accumulation type.
struct AffineMap {
  const void* x;
  const void* a;
  const void* b;
  Activation pre;
};

// y = post(scale ⊙ u + residual) on one sample. Where pre is the identity, a and b are those of this sample, with the
// scale in them, and `scale` is not read.
struct AffineRescale {
  AffineMap map;
  const void* scale;
  const void* residual;
  void* y;
  Activation post;
  bool streaming = false;
};

// The backward of AffineRescale on one sample; grad, saved, grad_residual and streaming as in RescaleBackward.
//   gv = g ⊙ post'(v)     gp = (gv ⊙ scale + grad_mean) ⊙ pre'(a ⊙ x + b), or gv where pre is the identity
//   gx = factor ⊙ gp + slope ⊙ x + offset
// Where `keeps`, the pass that sums leaves what the pass that writes needs in the maps that it will write: pre'(a ⊙ x +
// b) in grad_x where pre is not the identity, gv in grad_residual where post is not. That pass then reads gv, the slope
// and x, and computes no activation.
struct AffineBackward {
  AffineMap map;
  const void* grad;
  const void* scale;
  const void* saved;
  const void* grad_mean;
  const void* center;  // sums are taken of gp ⊙ (x - center)
  const void* factor;
  const void* slope;  // null: no term in x
  const void* offset;
  void* grad_x;
  void* grad_residual;
  Activation post;
  bool streaming = false;
  bool keeps = false;
};

// A batch normalisation of N samples of C channels and P points, or a given affine map in its place; all vectors in the
// accumulation type, small ones [C], others [N, C].
struct Normalization {
  std::int64_t samples, channels, points;
  const void* weight;   // null: 1
  const void* bias;     // null: 0
  const void* mean;     // null: nothing is normalised; a = weight, b = bias
  const void* inverse;  // 1 / standard deviation; with mean
};

}  // namespace se_ext
