// What the ops with a batch normalisation share: its vectors, and the pass over the map that finds the batch's
// statistics.
#pragma once

#include "maps.h"

namespace se_ext::cuda {

// The vectors of a Normalization, in the accumulation type, kept alive.
struct Vectors {
  at::Tensor weight, bias, mean, inverse;  // [C], undefined where absent

  Vectors(const ops::BatchNorm& norm, at::ScalarType type)
      : weight(vector_in(norm.weight, type)), bias(vector_in(norm.bias, type)) {}

  // What forward found of its batch.
  void use(const ops::SavedStatistics& saved, at::ScalarType type) {
    mean = vector_in(saved.mean, type);
    inverse = vector_in(saved.inverse, type);
  }
  Normalization of(const FeatureMap& x) const {
    return {x.samples, x.slab.channels, x.slab.points, data(weight), data(bias), data(mean), data(inverse)};
  }
};

// Fills `statistics` and the means of the samples [N, C], unless undefined or of no rows; gives v its mean and inverse;
// writes the affine map that they make, a and b [C].
void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const Statistics& statistics,
                         const at::Tensor& sample_means, void* a, void* b);

// Where the gradient of a weight or bias [C] is summed up, in the accumulation type: `to` itself, a tensor of its own,
// or where it is not wanted `scratch`. On a map of no points it is zeros: its sums hold the mean of no points, NaN.
class VectorGradient {
 public:
  VectorGradient(const FeatureMap& x, const at::Tensor& to, void* scratch);
  void* sums() const { return sums_; }
  void write_back() const;

 private:
  bool is_empty_;
  std::optional<InType> tensor_;  // where wanted
  void* sums_;
};

}  // namespace se_ext::cuda
