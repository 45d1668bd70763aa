#include "../ops/adapters.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext {

template <>
void Backend<Cpu>::squeeze(const ops::Squeeze& a, const Tensor& z) {
  using namespace cpu;
  const FeatureMap x(a.input);
  const InType means(z, x.accumulation_type());

  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  const Schedule schedule = Schedule::of(x, 1, 0);
  Reduction tiles(x, schedule);
  Scratch scratch(tiles.scratch_items(), 1, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  schedule.run(x.samples, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, x.slab.points, Pointer(means.tensor),
                 [&](std::int64_t n, Tile tile, void* sums) { map.squeeze(x.slab, tile, x.sample(n), sums); });
  });
  means.write_back();
}

}  // namespace se_ext
