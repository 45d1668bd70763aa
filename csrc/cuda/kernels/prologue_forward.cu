// The rescale behind a prologue.
#include "prologue.cuh"

namespace se_ext::cuda {

cudaError_t write_prologue_rescale(const Batch& batch, const Prologue& p, const void* drop, const RescaleMaps& m) {
  return with_type(batch.dtype, [&]<class T>(T) {
    return with_pre_and_post(p.pre, m.post, [&]<class Pre, class Post>(Pre pre, Post post) {
      return launch_writes(batch, make_rescale<T>(batch, p, drop, m, pre, post));
    });
  });
}

}  // namespace se_ext::cuda
