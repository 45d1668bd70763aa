// The squeeze, plain and behind a prologue, and the moments for a batch norm.
#include "map.cuh"

namespace se_ext::cuda {

std::int64_t partial_items(const Batch& batch, std::int64_t batch_samples, int parts) {
  const Tiling tiling = Tiling::of(batch.slab, batch.dtype);
  return tiling.tiles > 1 ? batch_samples * tiling.tiles * parts * batch.slab.channels : 0;
}

cudaError_t sum_input(const Batch& batch, const void* x, const Sums& sums) {
  return with_type(batch.dtype,
                   [&]<class T>(T) { return launch_sums(batch, SumInput<T>{static_cast<const T*>(x)}, sums); });
}

cudaError_t sum_prologue(const Batch& batch, const void* x, const Prologue& p, const Sums& sums) {
  return with_type(batch.dtype, [&]<class T>(T) {
    using A = acc_t<T>;
    return launch_sums(
        batch,
        SumPrologue<T>{{static_cast<const T*>(x)}, static_cast<const A*>(p.a), static_cast<const A*>(p.b), Any(p.pre)},
        sums);
  });
}

cudaError_t sum_moments(const Batch& batch, const void* x, const Sums& sums) {
  const auto [channels, points, layout] = batch.slab;
  const std::int64_t step = layout == Layout::ChannelsFirst ? points : 1;
  return with_type(batch.dtype, [&, slab = channels * points]<class T>(T) {
    return launch_sums(batch, SumMoments<T>{{static_cast<const T*>(x)}, slab, step}, sums);
  });
}

}  // namespace se_ext::cuda
