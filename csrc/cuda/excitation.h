// The excitation on a range of samples, forward and backward. All vectors are [N, C] or [N, M] in the accumulation
// type.
//   hidden = W1 z + b1      h = act(hidden)      t = W2 h + b2      s = gate(t)
#pragma once

#include "maps.h"
#include "plan.h"

namespace se_ext::cuda {

class Excitation {
 public:
  // Weights in their own dtype; made contiguous and aligned where they are not.
  Excitation(const ops::Excitation& e, const ops::Activations& activations);

  std::int64_t channels() const { return first_.columns; }
  std::int64_t hidden_channels() const { return first_.rows; }
  std::int64_t weight_bytes() const { return 2 * channels() * hidden_channels() * w1_.element_size(); }
  Activation gate() const { return second_.activation; }
  const Layer& first() const { return first_; }
  const Layer& second() const { return second_; }

  // What a plan is chosen for: an op on x with this excitation that reads some maps twice, and others once (plan.h).
  Work work(const FeatureMap& x, int maps_read_twice, int maps_once) const {
    return {x.dtype, x.slab, x.samples, maps_read_twice, maps_once, hidden_channels(), weight_bytes()};
  }

  struct Forward {
    const void* z;
    void* hidden;
    void* h;
    void* scale;
  };
  void forward(const Forward& vectors, std::int64_t first, std::int64_t samples, cudaStream_t stream) const;

  // grad_t = dL/dt → h, grad_hidden, grad_z / points
  struct Backward {
    const void* grad_t;
    const void* hidden;
    void* h;
    void* grad_hidden;
    void* grad_z;
    std::int64_t points;
  };
  void backward(const Backward& vectors, std::int64_t first, std::int64_t samples, cudaStream_t stream) const;

  // Sums over the batch, after backward has run on all of it; undefined: not wanted.
  struct WeightGradients {
    const at::Tensor &w1, &b1, &w2, &b2;
  };
  void weight_gradients(const WeightGradients& to, const Backward& vectors, const void* z, std::int64_t samples,
                        cudaStream_t stream) const;

 private:
  at::Tensor w1_, b1_, w2_, b2_;
  Layer first_, second_;
};

}  // namespace se_ext::cuda
