#include <torch/library.h>

#include "../checks.h"
#include "maps.h"

namespace se_ext::cuda {
namespace {

at::Tensor squeeze(const at::Tensor& input) {
  checks::squeeze(input);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const auto type = accumulation_type(input.scalar_type());
  at::Tensor z = empty_matrix(x.samples, x.slab.channels, input, type);
  const Batch batch = batch_of(x);
  const std::int64_t partials = partial_items(batch, x.samples, 1);
  Scratch scratch(partials, 1, input.options().dtype(type));
  C10_CUDA_CHECK(
      sum_input(batch, data(x.tensor), {writable(z), scratch.take(partials), static_cast<double>(x.slab.points)}));
  return z.to(input.scalar_type());
}

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  m.impl("squeeze", squeeze);
}

}  // namespace
}  // namespace se_ext::cuda
