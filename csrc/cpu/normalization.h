// What the ops with a batch normalisation share: its vectors, and the pass over the map that finds the batch's
// statistics.
#pragma once

#include "../checks.h"
#include "../feature_map.h"
#include "isa.h"
#include "parallel.h"

namespace se_ext::cpu {

inline Pointer pointer(const at::Tensor& t) {
  return t.defined() ? Pointer(t) : Pointer();
}

// The vectors of a Normalization, in the accumulation type, kept alive.
struct Vectors {
  at::Tensor weight, bias, mean, inverse;  // [C], undefined where absent
  at::ScalarType type;

  Vectors(const checks::OptionalTensor& weight_, const checks::OptionalTensor& bias_, at::ScalarType type_)
      : weight(in_type(weight_, type_)), bias(in_type(bias_, type_)), type(type_) {}

  static at::Tensor in_type(const checks::OptionalTensor& t, at::ScalarType type) {
    return t.has_value() ? t->to(type).contiguous() : at::Tensor();
  }
  Normalization of(const FeatureMap& x) const {
    return {x.samples,          x.slab.channels,    x.slab.points,        pointer(weight).base,
            pointer(bias).base, pointer(mean).base, pointer(inverse).base};
  }
  const NormKernels& kernels() const {
    return type == at::kDouble ? cpu::kernels().norm_double : cpu::kernels().norm_float;
  }
  const DenseKernels& sums() const {
    return cpu::kernels().dense[static_cast<int>(type == at::kDouble ? DType::Float64 : DType::Float32)];
  }
};

// What is kept of a batch; of no elements where nothing is normalised, or where it is not asked for.
struct Statistics {
  at::Tensor mean, var, inverse;  // [C]
  at::Tensor sample_means;        // [N, C], mean of x over each sample

  // Uninitialised.
  static Statistics empty(const FeatureMap& x, at::ScalarType type, bool of_batch, bool of_samples);
};

// Fills `found`, and gives v its mean and inverse.
void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const Statistics& found);

// The gradient of a weight or bias from what was summed up of the batch, in the dtype that it has. A map of no points
// gives zeros: its sums hold the mean of no points, which is NaN.
at::Tensor vector_gradient(const FeatureMap& x, const checks::OptionalTensor& of, const Pointer& from,
                           at::ScalarType type);

// f(n) for this thread's samples of the block. Ends with a barrier.
template <class F>
void for_each_sample(Team team, std::int64_t first, std::int64_t samples, const F& f) {
  const auto [begin, end] = team.share(samples);
  for (std::int64_t n = first + begin; n < first + end; ++n) f(n);
  team.barrier();
}

}  // namespace se_ext::cpu
