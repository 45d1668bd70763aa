// The excitation's two layers for a batch, forward and backward: small products, in which a block takes a part of the
// weight and reads it once for several samples.
#include "../launch.h"
#include "dense.cuh"
#include "launching.cuh"

namespace se_ext::cuda {
namespace {

constexpr int kSamples = 4;  // of a batch, per pass over the weight

template <int n, int samples, class W, class A>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const W* weight, const W* bias, const A* input, A* hidden, A* output, std::int64_t rows,
                   std::int64_t columns, std::int64_t end, std::int64_t blocks_of_rows, int lane_count,
                   Activation activation) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t block_of_samples = blockIdx.x / blocks_of_rows;
  const std::int64_t mine =
      (blockIdx.x - block_of_samples * blocks_of_rows) * (kThreads / lane_count) + thread / lane_count;
  const std::int64_t row = mine < rows ? mine : rows - 1;
  // The last block of samples starts early enough to be full.
  std::int64_t sample = block_of_samples * samples;
  if (sample + samples > end) sample = end - samples;
  const auto sums = dot<n, samples>(weight + row * columns, input + sample * columns, columns, columns, lane_count);
  if (mine >= rows || (thread & (lane_count - 1)) != 0) return;
  const A b = bias ? load<1>(bias + row)[0] : A(0);
  SE_EXT_UNROLL
  for (int s = 0; s < samples; ++s) {
    const A value = sums[s] + b;
    const std::int64_t at = (sample + s) * rows + row;
    if (hidden) hidden[at] = value;
    output[at] = activate_one(activation, value);
  }
}

// Tiles of both backward kernels: a thread has kSide × kSide sums in registers, so that what it loads for one of them
// serves kSide; kAcross threads lie side by side along the columns of the weight.
constexpr int kAcross = 8;
constexpr int kColumns = kSide * kAcross;  // of a block

// A thread for each result of a block.
static_assert(kSamples == kSide && kAcross * kPieceGroups == kSamples * kColumns);

// out[sample, column] = Σ_row grad[sample, row] weight[row, column], for `kSamples` samples: a thread takes the pieces
// of one group of the weight's rows. Reads the weight once for kSamples samples.
template <bool whole, class W, class A>
__global__ void __launch_bounds__(kAcross* kPieceGroups)
    backward_kernel(const W* weight, const A* grad, const A* hidden, A* activated, A* grad_input, std::int64_t rows,
                    std::int64_t columns, std::int64_t end, std::int64_t blocks_of_columns, Activation activation,
                    A divisor) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kAcross, group = thread / kAcross;
  const std::int64_t block_of_samples = blockIdx.x / blocks_of_columns;
  const std::int64_t first_column = (blockIdx.x - block_of_samples * blocks_of_columns) * kColumns;
  const std::int64_t first = block_of_samples * kSamples, mine = first_column + lane * kSide;
  const std::int64_t samples = end - first < kSamples ? end - first : kSamples;
  Lanes<const A*, kSamples> of_sample;
  Lanes<A, kSide> sums[kSamples];
  SE_EXT_UNROLL
  for (int s = 0; s < kSamples; ++s) {
    // Beyond the last sample the last one stands in; its sums are not written.
    of_sample[s] = grad + (first + (s < samples ? s : samples - 1)) * rows;
    sums[s] = lanes<A, kSide>([](int) { return A(0); });
  }
  if (mine < columns) {
    for (std::int64_t row = group * kPieceRows; row < rows; row += kPieceGroups * kPieceRows) {
      const auto piece = sum_piece<whole, 4>(weight, rows, columns, row, mine, of_sample);
      SE_EXT_UNROLL
      for (int s = 0; s < kSamples; ++s) {
        SE_EXT_UNROLL
        for (int j = 0; j < kSide; ++j) sums[s][j] += piece[s][j];
      }
    }
  }
  A* shared = reinterpret_cast<A*>(dynamic_shared());  // [kSamples, kPieceGroups, kColumns]
  SE_EXT_UNROLL
  for (int s = 0; s < kSamples; ++s) {
    SE_EXT_UNROLL
    for (int j = 0; j < kSide; ++j) shared[(s * kPieceGroups + group) * kColumns + lane * kSide + j] = sums[s][j];
  }
  __syncthreads();
  const int sample = thread / kColumns;
  const std::int64_t column = first_column + thread % kColumns;
  if (column >= columns || sample >= samples) return;
  const A* partial = shared + sample * kPieceGroups * kColumns + thread % kColumns;
  A sum = partial[0];
  for (int k = 1; k < piece_groups(rows); ++k) sum += partial[k * kColumns];
  const std::int64_t at = (first + sample) * columns + column;
  if (hidden) {
    const A before = hidden[at], after = activate_one(activation, before);
    activated[at] = after;
    sum = gradient_one(activation, sum, before, after);
  }
  grad_input[at] = sum / divisor;
}

constexpr int kDown = 8;              // threads one below the other, along the rows of the weight
constexpr int kRows = kSide * kDown;  // of the weight, of a block

// grad_weight[row, column] = Σ_n grad[n, row] input[n, column], grad_bias[row] = Σ_n grad[n, row]; samples in order.
// Reads input once for kRows rows of the weight, and grad once for kColumns columns. The first block of columns has the
// bias.
template <bool whole, class W, class A>
__global__ void __launch_bounds__(kAcross* kDown)
    gradients_kernel(const A* grad, const A* input, std::int64_t samples, std::int64_t rows, std::int64_t columns,
                     W* grad_weight, W* grad_bias, std::int64_t blocks_of_columns) {
  constexpr int kAhead = whole && sizeof(A) == 4 ? 8 : 4;  // samples: as many as find registers
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t block_of_rows = blockIdx.x / blocks_of_columns;
  const std::int64_t block_of_columns = blockIdx.x - block_of_rows * blocks_of_columns;
  const std::int64_t row = block_of_rows * kRows + thread / kAcross * kSide;
  const std::int64_t column = block_of_columns * kColumns + thread % kAcross * kSide;
  if (row >= rows) return;
  const bool has_columns = grad_weight && column < columns, has_bias = grad_bias && column == 0;
  const Lanes<A, kSide> zeros = lanes<A, kSide>([](int) { return A(0); });
  Lanes<A, kSide> sums[kSide], bias = zeros;
  SE_EXT_UNROLL
  for (int r = 0; r < kSide; ++r) sums[r] = zeros;
  for (std::int64_t start = 0; start < samples; start += kAhead) {
    Lanes<A, kSide> g[kAhead], v[kAhead];
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (start + k < samples) {
        g[k] = load_side<whole>(grad + (start + k) * rows + row, rows - row);
        v[k] = has_columns ? load_side<whole>(input + (start + k) * columns + column, columns - column) : zeros;
      }
    }
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (start + k < samples) {
        SE_EXT_UNROLL
        for (int r = 0; r < kSide; ++r) {
          bias[r] += g[k][r];
          SE_EXT_UNROLL
          for (int j = 0; j < kSide; ++j) sums[r][j] = multiply_add(g[k][r], v[k][j], sums[r][j]);
        }
      }
    }
  }
  SE_EXT_UNROLL
  for (int r = 0; r < kSide; ++r) {
    if (row + r >= rows) return;
    if (has_bias) store(grad_bias + row + r, Lanes<A, 1>{{bias[r]}});
    if (!has_columns) continue;
    W* const to = grad_weight + (row + r) * columns + column;
    if constexpr (whole) {
      store(to, sums[r]);
    } else {
      for (int j = 0; j < kSide; ++j) {
        if (column + j < columns) store(to + j, Lanes<A, 1>{{sums[r][j]}});
      }
    }
  }
}

}  // namespace

cudaError_t layer_forward(const Layer& l, const LayerForward& v, std::int64_t first, std::int64_t samples,
                          cudaStream_t stream) {
  if (l.rows == 0 || samples == 0) return cudaSuccess;
  const DotPlan plan(l.columns, l.type);
  const std::int64_t blocks = divide_up(l.rows, kThreads / plan.lanes);
  return with_weight_type(l.type, [&]<class W, class A>() {
    const auto run = [&]<int n, int batch>() {
      return launch(forward_kernel<n, batch, W, A>, blocks * divide_up(samples, batch), kThreads, 0, stream,
                    static_cast<const W*>(l.weight), static_cast<const W*>(l.bias),
                    static_cast<const A*>(v.input) + first * l.columns,
                    v.hidden ? static_cast<A*>(v.hidden) + first * l.rows : nullptr,
                    static_cast<A*>(v.output) + first * l.rows, l.rows, l.columns, samples, blocks, plan.lanes,
                    l.activation);
    };
    const auto choose = [&]<int n>() {
      return samples < kSamples ? run.template operator()<n, 1>() : run.template operator()<n, kSamples>();
    };
    return plan.access == 1 ? choose.template operator()<1>() : choose.template operator()<kFull<W>>();
  });
}

cudaError_t layer_backward(const Layer& l, const LayerBackward& v, std::int64_t first, std::int64_t samples,
                           cudaStream_t stream) {
  if (l.columns == 0 || samples == 0) return cudaSuccess;
  const std::int64_t blocks = divide_up(l.columns, kColumns);
  return with_weight_type(l.type, [&]<class W, class A>() {
    const auto run = [&]<bool whole>() {
      return launch(backward_kernel<whole, W, A>, blocks * divide_up(samples, kSamples), kAcross * kPieceGroups,
                    kSamples * kPieceGroups * kColumns * sizeof(A), stream, static_cast<const W*>(l.weight),
                    static_cast<const A*>(v.grad) + first * l.rows,
                    v.hidden ? static_cast<const A*>(v.hidden) + first * l.columns : nullptr,
                    v.hidden ? static_cast<A*>(v.activated) + first * l.columns : nullptr,
                    static_cast<A*>(v.grad_input) + first * l.columns, l.rows, l.columns, samples, blocks, l.activation,
                    static_cast<A>(v.divisor));
    };
    const bool whole = l.rows % kSide == 0 && l.columns % kSide == 0;
    return whole ? run.template operator()<true>() : run.template operator()<false>();
  });
}

cudaError_t layer_gradients(const Layer& l, const void* grad, const void* input, std::int64_t samples,
                            void* grad_weight, void* grad_bias, cudaStream_t stream) {
  if (!grad_weight && !grad_bias) return cudaSuccess;
  const std::int64_t blocks = grad_weight && l.columns > 0 ? divide_up(l.columns, kColumns) : 1;  // one for the bias
  return with_weight_type(l.type, [&]<class W, class A>() {
    const auto run = [&]<bool whole>() {
      return launch(gradients_kernel<whole, W, A>, blocks * divide_up(l.rows, kRows), kAcross * kDown, 0, stream,
                    static_cast<const A*>(grad), static_cast<const A*>(input), samples, l.rows, l.columns,
                    static_cast<W*>(grad_weight), static_cast<W*>(grad_bias), blocks);
    };
    const bool whole = l.rows % kSide == 0 && l.columns % kSide == 0;
    return whole ? run.template operator()<true>() : run.template operator()<false>();
  });
}

}  // namespace se_ext::cuda
