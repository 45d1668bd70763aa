// The rescale and its backward.
#include "map.cuh"

namespace se_ext::cuda {

cudaError_t write_rescale(const Batch& batch, const RescaleMaps& m) {
  return with_type(batch.dtype, [&]<class T>(T) {
    return with_post(m.post, [&]<class Post>(Post post) {
      using A = acc_t<T>;
      return launch_writes(batch, WriteRescale<T, Post>{static_cast<const T*>(m.x), static_cast<const A*>(m.scale),
                                                        static_cast<const T*>(m.residual), static_cast<T*>(m.y), post,
                                                        batch.slab.channels, batch.streaming});
    });
  });
}

cudaError_t sum_rescale_backward(const Batch& batch, const RescaleBackward& m, const Sums& sums) {
  return with_type(batch.dtype, [&]<class T>(T) {
    return with_post(m.post, [&]<class Post>(Post post) {
      using A = acc_t<T>;
      return launch_sums(batch,
                         SumRescaleBackward<T, Post>{{static_cast<const T*>(m.grad), static_cast<const T*>(m.x),
                                                      static_cast<const T*>(m.saved), post, slope_from_output(m.post)},
                                                     static_cast<const A*>(m.scale),
                                                     batch.slab.channels},
                         sums);
    });
  });
}

cudaError_t write_rescale_backward(const Batch& batch, const RescaleBackward& m) {
  return with_type(batch.dtype, [&]<class T>(T) {
    return with_post(m.post, [&]<class Post>(Post post) {
      using A = acc_t<T>;
      return launch_writes(
          batch, WriteRescaleBackward<T, Post>{{static_cast<const T*>(m.grad), static_cast<const T*>(m.x),
                                                static_cast<const T*>(m.saved), post, slope_from_output(m.post)},
                                               static_cast<const A*>(m.scale),
                                               static_cast<const A*>(m.grad_mean),
                                               static_cast<T*>(m.grad_x),
                                               static_cast<T*>(m.grad_residual),
                                               batch.slab.channels,
                                               batch.streaming});
    });
  });
}

}  // namespace se_ext::cuda
