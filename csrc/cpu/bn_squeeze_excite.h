// The block behind a batch normalisation (or a given affine map) and an activation: u = pre(a ⊙ x + b) takes the place
// of x; it is not a tensor of its own. Two algorithms, by pre:
//   the identity     z follows from each sample's mean of x, and the scale goes into a and b:
//   bn_squeeze_excite_affine.cpp an activation    u is computed from x in every pass: bn_squeeze_excite_activation.cpp
// Here is the state of a call that they share; bn_squeeze_excite.cpp fills it and chooses.
#pragma once

#include "excitation.h"
#include "normalization.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {

struct BnForward {
  const bool batch_statistics;
  const Activation pre, post;
  const FeatureMap x;
  const MapOutput out;
  const Excitation e;
  const std::int64_t N, C, M, slab;
  Vectors v;  // with the batch's statistics
  const Tensor residual, drop;
  const Schedule schedule;
  const bool streaming;
  Reduction tiles;
  Scratch scratch;
  const Pointer a_at, b_at, h_at, z_at, hidden_at, scale_at, means_at, residual_at, y_at, drop_at;

  // rows: how often the algorithm takes [N, C] of the scratch memory itself.
  BnForward(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
            const ops::SavedBnSqueezeExcite& saved, const Tensor& var, int rows);

  // A pass over a batch whose statistics were just taken finds its end in cache.
  template <class F>
  void run(const F& chunk) const {
    if (batch_statistics) {
      schedule.run_backwards(N, chunk);
    } else {
      schedule.run(N, chunk);
    }
  }
};

// One pass sums up what the gradients of the scale and of the normalisation need (prologue.h), another writes. The
// latter waits for the whole batch where the batch's statistics depend on x.
struct BnBackward {
  const bool batch_statistics;
  const Activation pre, post;
  const Gradients<8>& to;
  const FeatureMap x;
  const Excitation e;
  const std::int64_t N, C, M, slab;
  Vectors v;  // with the statistics that forward saved
  const Normalization norm;
  const Tensor grad, saved_map, z, hidden, scale, sample_means, drop;
  const Schedule schedule;
  const std::int64_t parts;  // sums per sample and channel
  Reduction tiles;
  Scratch scratch;
  const Pointer a_at, b_at, h_at, grad_hidden_at, grad_t_at, grad_z_at;
  const Pointer sums_at;                              // [N, parts, C]
  const Pointer dropped_at;                           // scale · drop_scale
  const Pointer totals_at;                            // the sums over the batch [parts, C]
  const Pointer grad_weight_at, slope_at, offset_at;  // what follows from them; gx has a term slope ⊙ x + offset
  const Pointer grad_at, saved_at, hidden_at, scale_at, means_at, drop_at, gx_at, gr_at;

  // rows: as in BnForward.
  BnBackward(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations, const Gradients<8>& to,
             int parts, int rows);

  const Tensor& grad_input() const { return to[0]; }
  const Tensor& grad_residual() const { return to[7]; }
  bool is_exact() const { return x.tensor.scalar_type() == v.type; }  // maps have the precision of what is computed

  // Whether anything asks for the sums over the batch: slope and offset, the gradients of the batch norm's vectors.
  bool needs_totals() const { return to[1].defined() || to[2].defined() || (batch_statistics && to[0].defined()); }

  void backward_of_excitation(Team team, std::int64_t first, std::int64_t samples) const {
    e.backward(team, first, samples, x.slab.points, scale_at, hidden_at, h_at, grad_t_at, grad_hidden_at, grad_z_at);
  }

  // sum(team, index, first, samples) over the batch, write(team, first, samples) behind it, and the gradients of the
  // weights.
  template <class Sum, class Write>
  void run(const Sum& sum, bool writes, const Write& write) const {
    schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
      sum(team, index, first, samples);
      if (writes && !batch_statistics) write(team, first, samples);
    });
    if (needs_totals()) finish_totals();
    if (writes && batch_statistics) {
      schedule.run_backwards(
          N, [&](Team team, int, std::int64_t first, std::int64_t samples) { write(team, first, samples); });
    }
    e.weight_gradients(N, Pointer(z), h_at, grad_t_at, grad_hidden_at, {to[3], to[4], to[5], to[6]});
  }

 private:
  void finish_totals() const;
};

void forward_behind_affine(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                           const ops::SavedBnSqueezeExcite& saved, const Tensor& var);
void forward_behind_activation(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                               const ops::SavedBnSqueezeExcite& saved, const Tensor& var);
void backward_behind_affine(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations,
                            const Gradients<8>& to);
void backward_behind_activation(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations,
                                const Gradients<8>& to);

}  // namespace se_ext::cpu
