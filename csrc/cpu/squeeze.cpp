#include <torch/library.h>

#include "../checks.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {
namespace {

at::Tensor squeeze(const at::Tensor& input) {
  checks::squeeze(input);
  const auto type = accumulation_type(input.scalar_type());
  const FeatureMap x(input);
  at::Tensor z = empty_matrix(x.samples, x.slab.channels, input, type);

  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  const Schedule schedule = Schedule::of(x, 1, 0);
  Reduction tiles(x, schedule, type);
  Scratch scratch(tiles.scratch_items(), 1, input.options().dtype(type));
  tiles.use(scratch.take(tiles.scratch_items()));
  schedule.run(x.samples, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, x.slab.points, Pointer(z),
                 [&](std::int64_t n, Tile tile, void* sums) { map.squeeze(x.slab, tile, x.sample(n), sums); });
  });
  return z.to(input.scalar_type());
}

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  m.impl("squeeze", squeeze);
}

}  // namespace
}  // namespace se_ext::cpu
