#include "normalization.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <limits>

#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {

Statistics Statistics::empty(const FeatureMap& x, at::ScalarType type, bool of_batch, bool of_samples) {
  const auto options = x.tensor.options().dtype(type);
  const auto statistic = [&] { return at::empty({of_batch ? x.slab.channels : 0}, options); };
  return {statistic(), statistic(), statistic(), at::empty({of_samples ? x.samples : 0, x.slab.channels}, options)};
}

void statistics_of_batch(const FeatureMap& x, Vectors& v, double eps, const Statistics& found) {
  const std::int64_t N = x.samples, C = x.slab.channels;
  const bool keeps_means = found.sample_means.numel() > 0;
  const Schedule schedule = Schedule::of(x, 1, 0);
  Reduction tiles(x, schedule, v.type, 2);
  Scratch scratch(tiles.scratch_items() + (keeps_means ? 3 : 4) * N * C, 4, x.tensor.options().dtype(v.type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer sums_at = scratch.take(2 * N * C), m2_at = scratch.take(N * C);
  const Pointer means_at = keeps_means ? Pointer(found.sample_means) : scratch.take(N * C);
  const AffineKernels& map = kernels().affine[static_cast<int>(x.dtype)];
  if (x.slab_elements() > 0) {
    schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
      tiles.reduce(team, index, first, samples, 1, sums_at,
                   [&](std::int64_t n, Tile tile, void* sums) { map.moments(x.slab, tile, x.sample(n), sums); });
      for_each_sample(team, first, samples, [&](std::int64_t n) {
        map.finish_moments(x.slab, x.sample(n), sums_at.at(2 * n * C), means_at.at(n * C), m2_at.at(n * C));
      });
    });
  } else {
    found.sample_means.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  v.kernels().batch_statistics(x.slab.points ? N : 0, C, x.slab.points, eps, means_at.base, m2_at.base,
                               found.mean.data_ptr(), found.var.data_ptr(), found.inverse.data_ptr());
  v.mean = found.mean;
  v.inverse = found.inverse;
}

at::Tensor vector_gradient(const FeatureMap& x, const checks::OptionalTensor& of, const Pointer& from,
                           at::ScalarType type) {
  if (x.slab.points == 0) return at::zeros(of->sizes(), of->options());
  at::Tensor t = at::empty(of->sizes(), of->options().dtype(type));
  if (t.numel() > 0) std::memcpy(t.data_ptr(), from.base, t.nbytes());  // no null pointer, even for no bytes
  return t.to(of->scalar_type());
}

}  // namespace se_ext::cpu
