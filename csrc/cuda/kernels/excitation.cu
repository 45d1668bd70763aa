// The excitation's two layers for a batch, forward and backward: small products, in which a block takes a few rows of
// the weight and reads them once for several samples.
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

constexpr int kColumns = 32;  // of the weight, side by side in a block
constexpr int kGroups = 16;   // of its rows

// out[column] = Σ_row grad[row] weight[row, column], for `kSamples` samples: a thread takes every kGroups-th row.
template <class W, class A>
__global__ void __launch_bounds__(kColumns* kGroups)
    backward_kernel(const W* weight, const A* grad, const A* hidden, A* activated, A* grad_input, std::int64_t rows,
                    std::int64_t columns, std::int64_t end, std::int64_t blocks_of_columns, Activation activation,
                    A divisor) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kColumns, group = thread / kColumns;
  const std::int64_t block_of_samples = blockIdx.x / blocks_of_columns;
  const std::int64_t column = (blockIdx.x - block_of_samples * blocks_of_columns) * kColumns + lane;
  const std::int64_t first = block_of_samples * kSamples;
  A sums[kSamples] = {};
  if (column < columns) {
    SE_EXT_UNROLL
    for (int s = 0; s < kSamples; ++s) {
      if (first + s >= end) continue;
      const A* of_sample = grad + (first + s) * rows;
      A sum = 0;
      SE_EXT_UNROLL_4
      for (std::int64_t row = group; row < rows; row += kGroups) {
        sum = multiply_add(of_sample[row], load<1>(weight + row * columns + column)[0], sum);
      }
      sums[s] = sum;
    }
  }
  A* shared = reinterpret_cast<A*>(dynamic_shared());  // [kSamples, kGroups, kColumns]
  SE_EXT_UNROLL
  for (int s = 0; s < kSamples; ++s) shared[(s * kGroups + group) * kColumns + lane] = sums[s];
  __syncthreads();
  if (group >= kSamples || column >= columns || first + group >= end) return;
  const A* partial = shared + group * kGroups * kColumns + lane;
  A sum = partial[0];
  for (int k = 1; k < kGroups; ++k) sum += partial[k * kColumns];
  const std::int64_t at = (first + group) * columns + column;
  if (hidden) {
    const A before = hidden[at], after = activate_one(activation, before);
    activated[at] = after;
    sum = gradient_one(activation, sum, before, after);
  }
  grad_input[at] = sum / divisor;
}

// grad_weight[row, column] = Σ_n grad[n, row] input[n, column], samples in order; column `columns` is the bias.
template <class W, class A>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const A* grad, const A* input, std::int64_t samples, std::int64_t rows, std::int64_t columns,
                     W* grad_weight, W* grad_bias, std::int64_t items) {
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const bool is_bias = i >= rows * columns;
    const std::int64_t row = is_bias ? i - rows * columns : i / columns;
    const std::int64_t column = is_bias ? 0 : i - row * columns;
    if (is_bias ? !grad_bias : !grad_weight) continue;
    A sum = 0;
    SE_EXT_UNROLL_4
    for (std::int64_t n = 0; n < samples; ++n) {
      sum = multiply_add(grad[n * rows + row], is_bias ? A(1) : input[n * columns + column], sum);
    }
    store(is_bias ? grad_bias + row : grad_weight + i, Lanes<A, 1>{{sum}});
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
    return launch(backward_kernel<W, A>, blocks * divide_up(samples, kSamples), kColumns * kGroups,
                  kSamples * kGroups * kColumns * sizeof(A), stream, static_cast<const W*>(l.weight),
                  static_cast<const A*>(v.grad) + first * l.rows,
                  v.hidden ? static_cast<const A*>(v.hidden) + first * l.columns : nullptr,
                  v.hidden ? static_cast<A*>(v.activated) + first * l.columns : nullptr,
                  static_cast<A*>(v.grad_input) + first * l.columns, l.rows, l.columns, samples, blocks, l.activation,
                  static_cast<A>(v.divisor));
  });
}

cudaError_t layer_gradients(const Layer& l, const void* grad, const void* input, std::int64_t samples,
                            void* grad_weight, void* grad_bias, cudaStream_t stream) {
  const std::int64_t items = l.rows * l.columns + l.rows;
  if (!grad_weight && !grad_bias) return cudaSuccess;
  return with_weight_type(l.type, [&]<class W, class A>() {
    return launch(gradients_kernel<W, A>, in_turns(divide_up(items, kThreads)), kThreads, 0, stream,
                  static_cast<const A*>(grad), static_cast<const A*>(input), samples, l.rows, l.columns,
                  static_cast<W*>(grad_weight), static_cast<W*>(grad_bias), items);
  });
}

}  // namespace se_ext::cuda
