#include "maps.h"

namespace se_ext {

template <>
void Backend<Cuda>::squeeze(const ops::Squeeze& a, const Tensor& z) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.input);
  const InType means(z, x.accumulation_type());
  const Batch batch = batch_of(x);
  const std::int64_t partials = partial_items(batch, x.samples, 1);
  Scratch scratch(partials, 1, x.accumulation_options());
  C10_CUDA_CHECK(sum_input(batch, data(x.tensor),
                           {writable(means.tensor), scratch.take(partials), static_cast<double>(x.slab.points)}));
  means.write_back();
}

}  // namespace se_ext
