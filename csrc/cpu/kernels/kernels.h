// The kernel table: what one instruction set offers to the adapters. Torch-free; every pointer is to contiguous
// memory of the stated type, "acc" being double for float64 maps and float for all others.
#pragma once

#include "../../params.h"

namespace se_ext::cpu {

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
  bool streaming = false;  // the next op would miss the caches anyway: y is written past them
};

// u = pre(a ⊙ x + b) on one sample, a and b [C] in the accumulation type.
struct PrologueMap {
  const void* x;
  const void* a;
  const void* b;
  Activation pre;
};

// y = post(scale ⊙ u + residual) on one sample. Where pre is the identity, a and b are those of this sample, with the
// scale in them, and `scale` is not read.
struct PrologueRescale {
  PrologueMap map;
  const void* scale;
  const void* residual;
  void* y;
  Activation post;
  bool streaming = false;
};

// The backward of PrologueRescale on one sample; grad, saved, grad_residual and streaming as in RescaleBackward.
//   gv = g ⊙ post'(v)     gp = (gv ⊙ scale + grad_mean) ⊙ pre'(a ⊙ x + b), or gv where pre is the identity
//   gx = factor ⊙ gp + slope ⊙ x + offset
// Where `leaves_slopes`, the pass that sums writes what the next pass needs into the maps of the result: pre'(a ⊙ x +
// b) into grad_x where pre is not the identity, gv into grad_residual where post is not. The next pass then reads gv,
// the slope and x, and computes no activation.
struct PrologueBackward {
  PrologueMap map;
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
  bool leaves_slopes = false;
};

// Over the feature map, by its dtype (map.h). `sums` [C] in acc: ChannelsFirst writes the tile's channels only.
struct MapKernels {
  void (*squeeze)(const Slab&, Tile, const void* x, void* sums);
  void (*rescale)(const Slab&, Tile, const Rescale&);
  void (*rescale_backward_reduce)(const Slab&, Tile, const RescaleBackward&, void* sums);
  void (*rescale_backward_apply)(const Slab&, Tile, const RescaleBackward&);
};

// The same behind a prologue u = pre(a ⊙ x + b) (prologue.h), which says where `sums` have several parts.
struct PrologueKernels {
  void (*moments)(const Slab&, Tile, const void* x, void* sums);
  void (*finish_moments)(const Slab&, const void* x, const void* sums, void* mean, void* m2);
  void (*squeeze)(const Slab&, Tile, const PrologueMap&, void* u, void* sums);
  void (*rescale)(const Slab&, Tile, const PrologueRescale&);
  void (*backward_sums)(const Slab&, Tile, const PrologueBackward&, void* sums);
  void (*backward_apply)(const Slab&, Tile, const PrologueBackward&);
};

static constexpr int kSamplesAtOnce = 4;  // that a loaded weight of the excitation meets

// The excitation's products, by the weights' dtype; in and out are acc (dense.h).
struct DenseKernels {
  void (*matvec)(std::int64_t samples, std::int64_t rows, std::int64_t columns, const void* w, const void* bias,
                 const void* in, void* out, std::int64_t row_begin, std::int64_t row_end);
  void (*vecmat)(std::int64_t samples, std::int64_t rows, std::int64_t columns, const void* w, const void* in,
                 void* out, std::int64_t column_begin, std::int64_t column_end);
  void (*outer)(std::int64_t samples, std::int64_t rows, std::int64_t columns, const void* a, const void* b, void* out,
                std::int64_t row_begin, std::int64_t row_end);
  void (*sum_samples)(std::int64_t samples, std::int64_t columns, const void* a, void* out);
};

// Over small acc vectors (dense.h).
struct VectorKernels {
  void (*add_rows)(std::int64_t count, std::int64_t channels, const void* rows, void* sums);
  void (*divide)(std::int64_t count, std::int64_t divisor, void* values);
  void (*activation_forward)(Activation, std::int64_t count, const void* in, void* out);
  void (*activation_backward)(Activation, std::int64_t count, const void* grad, const void* at, void* out);
};

// The [C] and [N, C] vectors of a normalisation, in acc (normalization.h).
struct NormKernels {
  void (*batch_statistics)(std::int64_t samples, std::int64_t channels, std::int64_t points, double eps,
                           const void* means, const void* m2s, void* mean, void* var, void* inverse);
  void (*coefficients)(const Normalization&, void* a, void* b);
  void (*squeeze_from_mean)(const Normalization&, const void* mean, void* z);
  void (*product)(std::int64_t channels, const void* values, const void* factor, const void* vector, void* out);
  void (*scale_gradient)(const Normalization&, const void* sums, const void* drop, void* out);
  void (*sums_behind_scale)(const Normalization&, const void* scale, const void* grad_mean, const void* sample_mean,
                            void* sums);
  void (*sums_behind_activation)(std::int64_t channels, const void* scale, const void* grad_mean, void* sums);
  void (*backward_coefficients)(const Normalization&, const void* totals, void* grad_weight, void* slope, void* offset);
  void (*offset_of_sample)(std::int64_t channels, const void* grad_mean, const void* a, const void* batch_offset,
                           void* out);
};

struct KernelTable {
  MapKernels map[kDTypes];
  PrologueKernels prologue[kDTypes];
  DenseKernels dense[kDTypes];
  VectorKernels vector_float;
  VectorKernels vector_double;
  NormKernels norm_float;
  NormKernels norm_double;
};

namespace baseline {
const KernelTable& table();
}
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}

}  // namespace se_ext::cpu
