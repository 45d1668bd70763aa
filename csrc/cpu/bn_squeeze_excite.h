// The block behind a batch normalisation (or a given affine map) and an activation: u = pre(a ⊙ x + b) takes the place
// of x; it is not a tensor of its own. Two algorithms, by pre:
//   the identity     z follows from each sample's mean of x, and the scale goes into a and b:
//   bn_squeeze_excite_affine.cpp an activation    u is computed from x in every pass: bn_squeeze_excite_activation.cpp
// Here is what they share; bn_squeeze_excite.cpp chooses.
#pragma once

#include "excitation.h"
#include "normalization.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {

struct BnForward {
  const ops::BnSqueezeExcite& a;
  const ops::Activations& names;
  const Tensor& y;
  const ops::SavedBnSqueezeExcite& saved;
  const FeatureMap x;
  const Excitation e;
  Vectors v;  // with the batch's statistics
  const Tensor residual, drop;
  const Schedule schedule;

  BnForward(const ops::BnSqueezeExcite& a, const ops::Activations& names, const Tensor& y,
            const ops::SavedBnSqueezeExcite& saved, const Tensor& var);

  // A pass over a batch whose statistics were just taken finds its end in cache.
  template <class F>
  void run(const F& chunk) const {
    if (a.batch_statistics) {
      schedule.run_backwards(x.samples, chunk);
    } else {
      schedule.run(x.samples, chunk);
    }
  }
};

// One pass sums up what the gradients of the scale and of the normalisation need (prologue.h), another writes. The
// latter waits for the whole batch where the batch's statistics depend on x.
struct BnBackward {
  const ops::BnSqueezeExcite& a;  // forward's arguments
  const ops::Activations& names;
  const Gradients<8>& to;
  const FeatureMap x;
  const Excitation e;
  Vectors v;  // with the statistics that forward saved
  const Tensor grad, saved_map, z, hidden, scale, sample_means, drop;
  const Schedule schedule;

  BnBackward(const ops::BnSqueezeExciteBackward& backward, const ops::Activations& names, const Gradients<8>& to);

  const Tensor& grad_input() const { return to[0]; }
  const Tensor& grad_weight() const { return to[1]; }
  const Tensor& grad_bias() const { return to[2]; }
  const Tensor& grad_residual() const { return to[7]; }

  // Whether the sums over the batch are asked for: slope and offset of the pass that writes, the gradients of the batch
  // norm's vectors.
  bool needs_totals() const {
    return grad_weight().defined() || grad_bias().defined() || (a.batch_statistics && grad_input().defined());
  }

  // From the sums of each sample [N, parts, C] to those of the batch, and what follows from them; all [C].
  struct Totals {
    Pointer sums, grad_weight, slope, offset;
  };
  void finish(const Pointer& sums, std::int64_t parts, const Totals& totals) const;
};

void forward_behind_affine(const BnForward& f);
void forward_behind_activation(const BnForward& f);
void backward_behind_affine(const BnBackward& b);
void backward_behind_activation(const BnBackward& b);

}  // namespace se_ext::cpu
