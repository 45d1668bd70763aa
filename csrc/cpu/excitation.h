// The excitation on a block of samples, forward and backward, split over a team. All buffers are [N, C] or [N, M] in
// the accumulation type and are indexed by the sample's number in the whole batch.
//   hidden = W1 z + b1      h = act(hidden)      t = W2 h + b2      s = gate(t)
#pragma once

#include <array>

#include "../checks.h"
#include "../feature_map.h"
#include "isa.h"
#include "parallel.h"

namespace se_ext::cpu {

class Excitation {
 public:
  // Weights in their own dtype; made contiguous where they are not.
  Excitation(const at::Tensor& w1, const checks::OptionalTensor& b1, const at::Tensor& w2,
             const checks::OptionalTensor& b2, Activation activation, Activation gate);

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

  struct Gradients {
    at::Tensor w1, b1, w2, b2;  // undefined: not wanted
  };
  // Uninitialised gradients of the weights, in the order w1, b1, w2, b2; a bias that is absent has none.
  Gradients empty_gradients(std::array<bool, 4> wanted) const;

  // Sums over the batch, samples in order, after backward has run on all of it.
  void weight_gradients(std::int64_t samples, Pointer z, Pointer h, Pointer grad_t, Pointer grad_hidden,
                        Gradients& gradients) const;

 private:
  at::Tensor w1_, b1_, w2_, b2_;  // as given, contiguous
  std::int64_t channels_, hidden_channels_;
  Activation activation_, gate_;
  const DenseKernels& dense_;
  const VectorKernels& vector_;
};

}  // namespace se_ext::cpu
