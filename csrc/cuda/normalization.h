// What the ops with a batch normalisation share: its vectors, and the pass over the map that finds the batch's
// statistics.
#pragma once

#include "maps.h"

namespace se_ext::cuda {

// The vectors of a Normalization, in the accumulation type, kept alive.
struct Vectors {
  at::Tensor weight, bias, mean, inverse;  // [C], undefined where absent

  Vectors(const checks::OptionalTensor& weight_, const checks::OptionalTensor& bias_, at::ScalarType type)
      : weight(vector_in(weight_, type)), bias(vector_in(bias_, type)) {}

  Normalization of(const FeatureMap& x) const {
    return {x.samples, x.slab.channels, x.slab.points, data(weight), data(bias), data(mean), data(inverse)};
  }
};

// What is kept of a batch; of no elements where nothing is normalised, or where it is not asked for.
struct BatchStatistics {
  at::Tensor mean, var, inverse;  // [C]
  at::Tensor sample_means;        // [N, C], mean of x over each sample

  // Uninitialised.
  static BatchStatistics empty(const FeatureMap& x, at::ScalarType type, bool of_batch, bool of_samples);
};

// Fills `found`, gives v its mean and inverse, and writes the affine map that they make, a and b [C].
void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const BatchStatistics& found, void* a, void* b);

// The gradient of a weight or bias, [C], from what was summed up of the batch, in the dtype that it has. A map of no
// points gives zeros: its sums hold the mean of no points, which is NaN.
at::Tensor vector_gradient(const FeatureMap& x, const checks::OptionalTensor& of, const at::Tensor& summed);

}  // namespace se_ext::cuda
