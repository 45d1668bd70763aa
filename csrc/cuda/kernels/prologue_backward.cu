// The two passes of the backward behind a prologue.
#include "prologue.cuh"

namespace se_ext::cuda {
namespace {

template <class T, class Pre, class Post>
PrologueGradient<T, Pre, Post> common(const Batch& batch, const PrologueBackward& p, const RescaleBackward& m, Pre pre,
                                      Post post) {
  using A = acc_t<T>;
  return {{static_cast<const T*>(m.grad), static_cast<const T*>(m.x), static_cast<const T*>(m.saved), post,
           slope_from_output(m.post)},
          pre,
          static_cast<const A*>(p.prologue.a),
          static_cast<const A*>(p.prologue.b),
          static_cast<const A*>(m.scale),
          static_cast<const A*>(p.drop),
          batch.slab.channels};
}

}  // namespace

cudaError_t sum_prologue_backward(const Batch& batch, const PrologueBackward& p, const RescaleBackward& m,
                                  const Sums& sums) {
  return with_type(batch.dtype, [&]<class T>(T) {
    return with_pre_and_post(p.prologue.pre, m.post, [&]<class Pre, class Post>(Pre pre, Post post) {
      return launch_sums(
          batch,
          SumPrologueBackward<T, Pre, Post>{common<T>(batch, p, m, pre, post), static_cast<const acc_t<T>*>(p.center)},
          sums);
    });
  });
}

cudaError_t write_prologue_backward(const Batch& batch, const PrologueBackward& p, const RescaleBackward& m) {
  return with_type(batch.dtype, [&]<class T>(T) {
    return with_pre_and_post(p.prologue.pre, m.post, [&]<class Pre, class Post>(Pre pre, Post post) {
      using A = acc_t<T>;
      return launch_writes(batch, WritePrologueBackward<T, Pre, Post>{
                                      common<T>(batch, p, m, pre, post), static_cast<const A*>(m.grad_mean),
                                      static_cast<const A*>(p.slope), static_cast<const A*>(p.offset),
                                      static_cast<T*>(m.grad_x), static_cast<T*>(m.grad_residual), batch.streaming});
    });
  });
}

}  // namespace se_ext::cuda
