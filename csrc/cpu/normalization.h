// What the ops with a batch normalisation share: its vectors, and the pass over the map that finds the batch's
// statistics.
#pragma once

#include "../feature_map.h"
#include "../ops/adapters.h"
#include "isa.h"
#include "parallel.h"

namespace se_ext::cpu {

// The vectors of a Normalization, in the accumulation type, kept alive.
struct Vectors {
  at::Tensor weight, bias, mean, inverse;  // [C], undefined where absent
  at::ScalarType type;

  Vectors(const ops::BatchNorm& norm, at::ScalarType accumulation_type)
      : weight(in_type(norm.weight, accumulation_type)),
        bias(in_type(norm.bias, accumulation_type)),
        type(accumulation_type) {}

  static at::Tensor in_type(const OptionalTensor& t, at::ScalarType type) {
    return t.has_value() ? t->to(type).contiguous() : at::Tensor();
  }
  // What forward found of its batch.
  void use(const ops::SavedStatistics& saved) {
    mean = saved.mean.contiguous();
    inverse = saved.inverse.contiguous();
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

// Fills `statistics` and the means of the samples [N, C], unless undefined or of no rows; gives v its mean and inverse.
void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const Statistics& statistics,
                         const at::Tensor& sample_means);

// The gradient of a weight or bias, where wanted, from what was summed up of the batch. On a map of no points it is
// zeros: its sums hold the mean of no points, which is NaN.
void write_gradient(const FeatureMap& x, const Pointer& from, const at::Tensor& to);

// f(n) for this thread's samples of the chunk. Ends with a barrier.
template <class F>
void for_each_sample(Team team, std::int64_t first, std::int64_t samples, const F& f) {
  const auto [begin, end] = team.share(samples);
  for (std::int64_t n = first + begin; n < first + end; ++n) f(n);
  team.barrier();
}

}  // namespace se_ext::cpu
