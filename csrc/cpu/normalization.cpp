#include "normalization.h"

#include <cstring>
#include <limits>

#include "folded_map.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {

void statistics_of_batch(const FeatureMap& map_of_batch, Vectors& v, double eps, const Statistics& statistics,
                         const at::Tensor& sample_means) {
  const bool has_means = sample_means.defined() && sample_means.numel() > 0;
  const FoldedMap x(map_of_batch, /*may_fold=*/!has_means);
  const std::int64_t N = x.samples, C = x.slab.channels;
  const Schedule schedule = Schedule::of(x, 1, 0);
  Reduction tiles(x, schedule, 2);
  Scratch scratch(tiles.scratch_items() + (has_means ? 3 : 4) * N * C, 4, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer sums_at = scratch.take(2 * N * C), m2_at = scratch.take(N * C);
  const Pointer means_at = has_means ? Pointer(sample_means) : scratch.take(N * C);
  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  if (x.slab_elements() > 0) {
    schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
      tiles.reduce(team, index, first, samples, 1, sums_at,
                   [&](std::int64_t n, Tile tile, void* sums) { map.moments(x.slab, tile, x.sample(n), sums); });
      for_each_sample(team, first, samples, [&](std::int64_t n) {
        map.finish_moments(x.slab, x.sample(n), sums_at.at(2 * n * C), means_at.at(n * C), m2_at.at(n * C));
      });
    });
  } else {
    if (sample_means.defined()) sample_means.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  // The points that were folded into one are as many samples of the channels.
  v.kernels().batch_statistics(x.slab.points ? N * x.fold : 0, x.channels, x.slab.points, eps, means_at.base,
                               m2_at.base, statistics.mean.data_ptr(), statistics.var.data_ptr(),
                               statistics.inverse.data_ptr());
  v.mean = statistics.mean;
  v.inverse = statistics.inverse;
}

void write_gradient(const FeatureMap& x, const Pointer& from, const at::Tensor& to) {
  if (!to.defined()) return;
  if (x.slab.points == 0) {
    to.zero_();
    return;
  }
  const InType t(to, x.accumulation_type());
  if (to.numel() > 0) std::memcpy(t.tensor.data_ptr(), from.base, t.tensor.nbytes());  // no null pointer for no bytes
  t.write_back();
}

}  // namespace se_ext::cpu
