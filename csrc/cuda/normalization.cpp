#include "normalization.h"

#include <ATen/ops/zeros_like.h>

#include <limits>

namespace se_ext::cuda {

BatchStatistics BatchStatistics::empty(const FeatureMap& x, at::ScalarType type, bool of_batch, bool of_samples) {
  const auto options = x.tensor.options().dtype(type);
  const auto statistic = [&] { return at::empty({of_batch ? x.slab.channels : 0}, options); };
  return {statistic(), statistic(), statistic(), at::empty({of_samples ? x.samples : 0, x.slab.channels}, options)};
}

void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const BatchStatistics& found, void* a, void* b) {
  const std::int64_t N = x.samples, C = x.slab.channels;
  const Batch batch = batch_of(x);
  const bool keeps_means = found.sample_means.numel() > 0;
  const std::int64_t partials = partial_items(batch, N, 2);
  Scratch scratch(partials + (keeps_means ? 2 : 3) * N * C, 3, found.mean.options());
  const Sums sums{scratch.take(2 * N * C), scratch.take(partials), 1};
  void* const sample_means = keeps_means ? writable(found.sample_means) : scratch.take(N * C);
  if (x.slab.points > 0) {
    C10_CUDA_CHECK(sum_moments(batch, data(x.tensor), sums));
  } else {
    found.sample_means.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  C10_CUDA_CHECK(batch_statistics(batch, data(x.tensor),
                                  {sums.sums, data(v.weight), data(v.bias), sample_means, writable(found.mean),
                                   writable(found.var), writable(found.inverse), a, b, eps}));
  v.mean = found.mean;
  v.inverse = found.inverse;
}

at::Tensor vector_gradient(const FeatureMap& x, const checks::OptionalTensor& of, const at::Tensor& summed) {
  return (x.slab.points > 0 ? summed : at::zeros_like(summed)).to(of->scalar_type());
}

}  // namespace se_ext::cuda
