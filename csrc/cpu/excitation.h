// The excitation on a chunk of samples, forward and backward, split over a team. All buffers are [N, C] or [N, M] in
// the accumulation type and are indexed by the sample's number in the whole batch.
//   hidden = W1 z + b1      h = act(hidden)      t = W2 h + b2      s = gate(t)
#pragma once

#include "../feature_map.h"
#include "../ops/ops.h"
#include "isa.h"
#include "parallel.h"

namespace se_ext::cpu {

class Excitation {
 public:
  // Weights in their own dtype; made contiguous where they are not.
  Excitation(const ops::Excitation& e, const ops::Activations& activations);

  std::int64_t channels() const { return channels_; }
  std::int64_t hidden_channels() const { return hidden_channels_; }
  std::int64_t weight_bytes() const { return 2 * channels_ * hidden_channels_ * w1_.element_size(); }

  // z → hidden, h, scale. Ends with a barrier.
  void forward(Team team, std::int64_t first, std::int64_t samples, Pointer z, Pointer hidden, Pointer h,
               Pointer scale) const;

  // grad (dL/ds, overwritten with dL/dt) → grad_hidden, grad_z / points. Ends with a barrier.
  void backward(Team team, std::int64_t first, std::int64_t samples, std::int64_t points, Pointer scale, Pointer hidden,
                Pointer h, Pointer grad, Pointer grad_hidden, Pointer grad_z) const;

  // h from what forward saved.
  void activate(std::int64_t samples, Pointer hidden, Pointer h) const;

  // Sums over the batch, samples in order, after backward has run on all of it; undefined: not wanted.
  struct WeightGradients {
    const at::Tensor &w1, &b1, &w2, &b2;
  };
  void weight_gradients(std::int64_t samples, Pointer z, Pointer h, Pointer grad_t, Pointer grad_hidden,
                        const WeightGradients& to) const;

 private:
  at::Tensor w1_, b1_, w2_, b2_;  // as given, contiguous
  std::int64_t channels_, hidden_channels_;
  Activation activation_, gate_;
  const DenseKernels& dense_;
  const VectorKernels& vector_;
};

}  // namespace se_ext::cpu
