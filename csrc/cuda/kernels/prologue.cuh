// What the launches behind a prologue share.
#pragma once

#include "map.cuh"

namespace se_ext::cuda {

// f(pre, post): where neither is the identity, and where pre is not, one kernel serves every post.
template <class F>
cudaError_t with_pre_and_post(Activation pre, Activation post, const F& f) {
  if (pre != Activation::Identity) return f(Any(pre), Any(post));
  return post == Activation::Identity ? f(Identity(pre), Identity(post)) : f(Identity(pre), Any(post));
}

template <class T, class Pre, class Post>
WritePrologueRescale<T, Pre, Post> make_rescale(const Batch& batch, const Prologue& p, const void* drop,
                                                const RescaleMaps& m, Pre pre, Post post) {
  using A = acc_t<T>;
  return {{static_cast<const T*>(m.x), static_cast<const A*>(m.scale), static_cast<const T*>(m.residual),
           static_cast<T*>(m.y), post, batch.slab.channels, batch.streaming},
          static_cast<const A*>(p.a),
          static_cast<const A*>(p.b),
          static_cast<const A*>(drop),
          pre};
}

}  // namespace se_ext::cuda
