// What crosses into the kernels of the depthwise convolution: rows of points, each of which is `channels` values that
// lie one behind the other. Weights, biases and their gradients are in blocks of as many channels as a register has
// lanes, [channels / lanes][taps][lanes] in the accumulation type, zeros behind the last channel (blocks.h).
#pragma once

#include <cstdint>

#include "../../../params.h"

namespace se_ext::cpu {

// A row of x that an output row reads, and the weights that it meets there.
struct ConvolvedRow {
  const void* x;  // its column 0
  const void* w;  // [taps of a row][lanes], of the first block
};

// y[j] = bias + Σ over rows, Σ over taps k: w[k] ⊙ x[first + j · stride + k], for j in [0, columns); columns of x
// outside [0, width) are zeros.
struct ConvolveRow {
  std::int64_t channels;
  std::int64_t columns;
  std::int64_t width;   // of x
  std::int64_t first;   // column of x
  std::int64_t x_step;  // elements from a point to the next
  std::int64_t y_step;
  std::int64_t block;  // values of w from a block of channels to the next
  const ConvolvedRow* rows;
  int count;         // of rows
  const void* bias;  // [blocks][lanes]; null: 0
  void* y;
};

// A row of g, the output's gradient, beside the rows of x that it has met: gw[r][k] += Σ_j g[j] ⊙ x_r[first + j ·
// stride
// + k], for some rows of the filter, r.
struct GradientRows {
  std::int64_t channels;
  std::int64_t columns;  // of g
  std::int64_t width;    // of x
  std::int64_t first;
  std::int64_t step;   // elements from a point to the next, in g and x
  std::int64_t g_row;  // elements from a row of g to the next
  std::int64_t block;  // values of gw from a block of channels to the next
  int count;           // of rows of g
  const void* g;
  const void* const* x;  // [count][rows of the filter]; null where the row lies outside
  void* gw;              // [rows of the filter][taps of a row][lanes], of the first block
  void* gb;              // [lanes], of the first block, += Σ_j g[j]; null: not wanted
};

// taps: of a row; with stride 1: 1 to 7, with stride 2: 3, 5 and 7.
using ConvolveKernel = void(int taps, int stride, const ConvolveRow&);

struct DepthwiseKernels {
  ConvolveKernel* convolve;  // of maps in the stored type
  // The same of a block of channels in scratch memory, whose points lie `lanes` apart: in the accumulation type, and
  // null in others.
  ConvolveKernel* convolve_block;
  // taps 3, 5, 7, stride 1, 2; rows of the filter at a time: at most rows_at_once(taps).
  void (*gradient)(int taps, int stride, int rows, const GradientRows&);
  int (*rows_at_once)(int taps);
  // Planes [channels][points], `plane` elements apart, as blocks [points][lanes] `block` values apart; and back.
  void (*to_blocks)(std::int64_t channels, std::int64_t points, std::int64_t plane, std::int64_t block,
                    const void* planes, void* blocks);
  void (*from_blocks)(std::int64_t channels, std::int64_t points, std::int64_t plane, std::int64_t block,
                      const void* blocks, void* planes);
  int lanes;  // channels of a block
};

struct DepthwiseTable {
  DepthwiseKernels of[kDTypes];
};

namespace baseline {
const DepthwiseTable& depthwise_table();
}
namespace avx2 {
const DepthwiseTable& depthwise_table();
}
namespace avx512 {
const DepthwiseTable& depthwise_table();
}

}  // namespace se_ext::cpu
