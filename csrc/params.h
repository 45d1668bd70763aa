// Plain types that cross from the adapters into the kernels. No torch type, no function with external linkage.
#pragma once

#include <cstdint>

#include "ops/activation.h"

namespace se_ext {

enum class DType : std::uint8_t { Float32, Float64, BFloat16, Float16 };
inline constexpr int kDTypes = 4;

// How one sample's slab lies in memory: ChannelsFirst [C, P], ChannelsLast [P, C].
enum class Layout : std::uint8_t { ChannelsFirst, ChannelsLast };

// One sample's part of a feature map: C channels of P points.
struct Slab {
  std::int64_t channels;
  std::int64_t points;
  Layout layout;
};

// The backward of y = post(scale ⊙ x + residual), g = dL/dy: of one sample on the CPU, of the batch in CUDA. `saved` is
// y where slope_from_output(post), else the residual; null where there was no residual (v = scale ⊙ x is then
// recomputed).
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
  bool streaming = false;  // the next op would miss the caches anyway: grad_x, wanted alone, is written past them
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
