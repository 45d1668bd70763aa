// What the adapters ask of the kernels: no torch type, pointers to the whole batch, and a range of samples to work on.
// Vectors are in the accumulation type, small ones [C], others [N, C]. All pointers are aligned to 16 bytes. Every
// function launches on the stream, waits for nothing, and returns what the launch returned.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../params.h"
#include "cluster_layout.h"

namespace se_ext::cuda {

// Samples [first, first + samples) of a batch of maps.
struct Batch {
  DType dtype;
  Slab slab;
  std::int64_t first, samples;
  bool streaming = false;  // the next op would miss the L2 cache anyway: what is written passes it by
  cudaStream_t stream = nullptr;
  int multiprocessors = 1;  // of the device
};

// Where the sums over a map go: sums [N, parts, C], divided by `divisor`; partials, of partial_items(), where tiles are
// summed apart.
struct Sums {
  void* sums;
  void* partials;
  double divisor;
};
std::int64_t partial_items(const Batch& batch, std::int64_t batch_samples, int parts);

// u = pre(a ⊙ x + b)        a, b [C]
struct Prologue {
  const void* a;
  const void* b;
  Activation pre;
};

// Sums [N, 1, C] of x, of u; [N, 2, C] of x - origin and of its square, origin being the channel's first point.
cudaError_t sum_input(const Batch& batch, const void* x, const Sums& sums);
cudaError_t sum_prologue(const Batch& batch, const void* x, const Prologue& prologue, const Sums& sums);
cudaError_t sum_moments(const Batch& batch, const void* x, const Sums& sums);

// y = post(scale ⊙ x + residual)        scale [N, C]; residual may be null; y may be x
struct RescaleMaps {
  const void* x;
  const void* scale;
  const void* residual;
  void* y;
  Activation post;
};
cudaError_t write_rescale(const Batch& batch, const RescaleMaps& maps);

// As RescaleBackward in params.h, on the batch: Σ gv ⊙ x [N, 1, C], and grad_x, grad_residual.
cudaError_t sum_rescale_backward(const Batch& batch, const RescaleBackward& maps, const Sums& sums);
cudaError_t write_rescale_backward(const Batch& batch, const RescaleBackward& maps);

// y = post(scale · drop ⊙ u + residual)        drop [N], null: 1
cudaError_t write_prologue_rescale(const Batch& batch, const Prologue& prologue, const void* drop,
                                   const RescaleMaps& maps);

// The backward of that; gv, saved, grad_mean as in RescaleBackward.
//   gp = (gv ⊙ scale · drop + grad_mean) ⊙ pre'(a ⊙ x + b)
//   gx = a ⊙ gp + slope ⊙ x + offset        slope, offset [C], null: 0
// Sums, with `center` [C] (null: 0): where pre is the identity [N, 2, C]
//   Σ gv        Σ gv ⊙ (x - center)
// else, with d = pre'(a ⊙ x + b), [N, 5, C]
//   Σ gv ⊙ u        Σ gv ⊙ d        Σ d        Σ gv ⊙ d ⊙ (x - center)        Σ d ⊙ (x - center)
struct PrologueBackward {
  Prologue prologue;
  const void* drop;
  const void* center;
  const void* slope;
  const void* offset;
};
cudaError_t sum_prologue_backward(const Batch& batch, const PrologueBackward& prologue, const RescaleBackward& maps,
                                  const Sums& sums);
cudaError_t write_prologue_backward(const Batch& batch, const PrologueBackward& prologue, const RescaleBackward& maps);

// ---- the excitation ----

// One layer: hidden [N, rows] = W v + b, output = act(hidden).
struct Layer {
  DType type;          // of the weight
  const void* weight;  // [rows, columns]
  const void* bias;    // [rows]; null: 0
  std::int64_t rows, columns;
  Activation activation;
};
struct LayerForward {
  const void* input;  // [N, columns]
  void* hidden;       // [N, rows]; null: not wanted
  void* output;       // [N, rows]
};
cudaError_t layer_forward(const Layer& layer, const LayerForward& vectors, std::int64_t first, std::int64_t samples,
                          cudaStream_t stream);

// grad_input = (Wᵀ grad) ⊙ act'(hidden) / divisor, and act(hidden); the activation is that of the layer before, hidden
// null: none.
struct LayerBackward {
  const void* grad;    // [N, rows]
  const void* hidden;  // [N, columns]; null: no activation
  void* activated;     // [N, columns], with hidden
  void* grad_input;    // [N, columns]
  double divisor;
};
cudaError_t layer_backward(const Layer& layer, const LayerBackward& vectors, std::int64_t first, std::int64_t samples,
                           cudaStream_t stream);

// grad_weight [rows, columns] = Σ_n grad[n] ⊗ input[n], grad_bias [rows] = Σ_n grad[n], in the weight's type; null: not
// wanted.
cudaError_t layer_gradients(const Layer& layer, const void* grad, const void* input, std::int64_t samples,
                            void* grad_weight, void* grad_bias, cudaStream_t stream);

// ---- vectors between the passes ----

// out [N, C] = grad ⊙ gate'(scale), scale being the gate's output
cudaError_t gate_gradient(Activation gate, bool is_double, const void* grad, const void* scale, void* out,
                          std::int64_t first, std::int64_t items, cudaStream_t stream);

// The moments of each sample [N, 2, C] about x's first points → mean, var, inverse of the batch, a, b [C] and each
// sample's mean [N, C].
struct StatisticsVectors {
  const void* sums;
  const void* weight;  // null: 1
  const void* bias;    // null: 0
  void* sample_means;  // [N, C]
  void* mean;
  void* var;
  void* inverse;
  void* a;
  void* b;
  double eps;
};
cudaError_t batch_statistics(const Batch& batch, const void* x, const StatisticsVectors& vectors);

// z = a · (mean of the sample - mean) + bias        mean null: 0
cudaError_t squeeze_from_means(const Normalization& norm, bool is_double, const void* sample_means, void* z,
                               cudaStream_t stream);

// a = weight · inverse, b = bias - mean · a
cudaError_t coefficients(const Normalization& norm, bool is_double, void* a, void* b, cudaStream_t stream);

// What sum_prologue_backward left → grad_t [N, C] = (Σ gv ⊙ u) · drop ⊙ gate'(scale)
struct ScaleGradient {
  const void* sums;
  const void* scale;
  const void* drop;  // null: 1
  void* grad_t;
  Activation gate;
  bool has_activation;  // pre is not the identity: five sums
};
cudaError_t scale_gradient(const Normalization& norm, bool is_double, const ScaleGradient& vectors, std::int64_t first,
                           std::int64_t samples, cudaStream_t stream);

// The same sums and what came back through the squeeze → the gradients of weight and bias, and slope and offset of the
// pass that writes, over the batch.
struct BatchBackward {
  const void* sums;
  const void* scale;
  const void* drop;          // null: 1
  const void* grad_mean;     // [N, C]
  const void* sample_means;  // [N, C], where pre is the identity
  bool has_activation;
  void* grad_weight;
  void* grad_bias;
  void* slope;
  void* offset;
};
cudaError_t batch_backward(const Normalization& norm, bool is_double, const BatchBackward& vectors,
                           cudaStream_t stream);

// ---- a sample in one cluster: both passes over its map, and the excitation between them ----

// Whether the current device has room for such a cluster of the task's kernel.
bool forward_can_launch(const ClusterTask& task, Cluster cluster);
bool backward_can_launch(const ClusterTask& task, Cluster cluster);

// The whole block. Where its vectors go; null: not wanted.
struct ClusterExcitation {
  Layer first, second;
  void* z;       // [N, C]
  void* hidden;  // [N, M]
  void* scale;   // [N, C]
};
// prologue and drop may be null; a prologue's pre is not the identity.
cudaError_t write_by_cluster(const Batch& batch, Cluster cluster, const ClusterExcitation& excitation,
                             const RescaleMaps& maps, const Prologue* prologue, const void* drop);

// Its backward, but for the gradients of the weights: what they are made of.
struct ClusterExcitationBackward {
  Layer first, second;
  const void* hidden;  // [N, M]
  void* grad_t;        // [N, C]
  void* activated;     // [N, M]
  void* grad_hidden;   // [N, M]
};
cudaError_t write_backward_by_cluster(const Batch& batch, Cluster cluster, const ClusterExcitationBackward& excitation,
                                      const RescaleBackward& maps);

}  // namespace se_ext::cuda
