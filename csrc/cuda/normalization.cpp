#include "normalization.h"

#include <limits>

namespace se_ext::cuda {

void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const Statistics& statistics,
                         const at::Tensor& sample_means, void* a, void* b) {
  const std::int64_t N = x.samples, C = x.slab.channels;
  const Batch batch = batch_of(x);
  const bool has_means = sample_means.defined() && sample_means.numel() > 0;
  const std::int64_t partials = partial_items(batch, N, 2);
  Scratch scratch(partials + (has_means ? 2 : 3) * N * C, 3, x.accumulation_options());
  const Sums sums{scratch.take(2 * N * C), scratch.take(partials), 1};
  void* const means = has_means ? writable(sample_means) : scratch.take(N * C);
  if (x.slab.points > 0) {
    C10_CUDA_CHECK(sum_moments(batch, data(x.tensor), sums));
  } else {
    if (sample_means.defined()) sample_means.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  C10_CUDA_CHECK(batch_statistics(batch, data(x.tensor),
                                  {sums.sums, data(v.weight), data(v.bias), means, writable(statistics.mean),
                                   writable(statistics.var), writable(statistics.inverse), a, b, eps}));
  v.mean = statistics.mean;
  v.inverse = statistics.inverse;
}

VectorGradient::VectorGradient(const FeatureMap& x, const at::Tensor& to, void* scratch)
    : is_empty_(x.slab.points == 0), sums_(scratch) {
  if (!to.defined()) return;
  tensor_.emplace(to, x.accumulation_type());
  sums_ = writable(tensor_->tensor);
}

void VectorGradient::write_back() const {
  if (!tensor_) return;
  if (is_empty_) {
    tensor_->output.zero_();
  } else {
    tensor_->write_back();
  }
}

}  // namespace se_ext::cuda
