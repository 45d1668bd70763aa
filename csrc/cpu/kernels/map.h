// Kernels over the feature map: squeeze, rescale and its backward, on one tile of one sample.
#pragma once

#include "activations.h"
#include "write_tile.h"

namespace se_ext::cpu::SE_EXT_ISA {

// sums[c] = Σ_p x[c, p]        reads the tile's x once
template <class T>
void squeeze(const Slab& slab, Tile tile, const void* x_data, void* sums) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(x_data);
  dispatch_layout(slab.layout, [&]<Layout layout>() {
    sum_tile<layout>(slab, tile, static_cast<A*>(sums), [=](Channels) SE_EXT_ALWAYS_INLINE {
      return [=](std::int64_t i, std::int64_t, auto lanes) SE_EXT_ALWAYS_INLINE { return load(x + i, lanes); };
    });
  });
}

// y = post(scale ⊙ x + residual)        reads x (and residual) once, writes y once; y may be x
template <class T>
void rescale(const Slab& slab, Tile tile, const Rescale& r) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(r.x);
  const A* scales = static_cast<const A*>(r.scale);
  const T* residual = static_cast<const T*>(r.residual);
  T* y = static_cast<T*>(r.y);
  dispatch_layout(slab.layout, [&]<Layout layout>() {
    dispatch(r.post, [&](auto post) {
      const auto factory = [=](Channels channels) SE_EXT_ALWAYS_INLINE {
        const PerChannel<layout, A> scale(scales, channels);
        return [=](std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
          const Vec<A> s = scale.at(c, lanes), here = load(x + i, lanes);
          return activate<post.value>(residual ? multiply_add(s, here, load(residual + i, lanes)) : s * here);
        };
      };
      write_tile<layout, is_cheap(post.value)>(slab, tile, y, r.streaming, factory);
    });
  });
}

// gv = g ⊙ post'(v) at one register; see RescaleBackward for what `saved` is.
template <class T, Activation post>
struct GradientOfSum {
  static constexpr Activation activation = post;
  const T* grad;
  const T* x;
  const T* saved;

  template <class V, class L>
  inline SE_EXT_ALWAYS_INLINE V at(std::int64_t i, V scale, L lanes) const {
    const V g = load(grad + i, lanes);
    if constexpr (post == Activation::Identity) {
      return g;
    } else if constexpr (slope_from_output(post)) {
      const V y = saved ? load(saved + i, lanes) : activate<post>(scale * load(x + i, lanes));
      return gradient<post>(g, y);
    } else {
      const V here = load(x + i, lanes);
      return gradient<post>(g, saved ? multiply_add(scale, here, load(saved + i, lanes)) : scale * here);
    }
  }
};

template <class T, class F>
SE_EXT_INLINE void dispatch_backward(const Slab& slab, const RescaleBackward& b, F&& f) {
  dispatch_layout(slab.layout, [&]<Layout layout>() {
    dispatch(b.post, [&](auto post) {
      f.template operator()<layout>(GradientOfSum<T, post.value>{
          static_cast<const T*>(b.grad), static_cast<const T*>(b.x), static_cast<const T*>(b.saved)});
    });
  });
}

// sums[c] = Σ_p gv[c, p] x[c, p]        reads g and x (and saved) once
template <class T>
void rescale_backward_reduce(const Slab& slab, Tile tile, const RescaleBackward& b, void* sums) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(b.x);
  const A* scales = static_cast<const A*>(b.scale);
  dispatch_backward<T>(slab, b, [&]<Layout layout>(auto gv) {
    sum_tile<layout, is_cheap(gv.activation)>(
        slab, tile, static_cast<A*>(sums), [=](Channels channels) SE_EXT_ALWAYS_INLINE {
          const PerChannel<layout, A> scale(scales, channels);
          return [=](std::int64_t i, std::int64_t c, auto lanes)
                     SE_EXT_ALWAYS_INLINE { return gv.at(i, scale.at(c, lanes), lanes) * load(x + i, lanes); };
        });
  });
}

// grad_x = gv ⊙ scale + grad_mean, grad_residual = gv        reads g (and x, saved, where post needs them) once
template <class T>
void rescale_backward_apply(const Slab& slab, Tile tile, const RescaleBackward& b) {
  using A = acc_t<T>;
  const A* scales = static_cast<const A*>(b.scale);
  const A* means = static_cast<const A*>(b.grad_mean);
  T* grad_x = static_cast<T*>(b.grad_x);
  T* grad_residual = static_cast<T*>(b.grad_residual);
  dispatch_backward<T>(slab, b, [&]<Layout layout>(auto gv) {
    constexpr bool kCheap = is_cheap(gv.activation);
    if (grad_residual) {
      struct Both {
        Vec<A> grad_x, grad_residual;
      };
      const auto factory = [=](Channels channels) SE_EXT_ALWAYS_INLINE {
        const PerChannel<layout, A> scale(scales, channels);
        const PerChannel<layout, A> mean(means, channels);
        return [=](std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
          const Vec<A> s = scale.at(c, lanes);
          const Vec<A> g = gv.at(i, s, lanes);
          return Both{multiply_add(g, s, mean.at(c, lanes)), g};
        };
      };
      visit_tile<layout, A, kCheap>(slab, tile, factory, [=](std::int64_t i, Both v, auto lanes) SE_EXT_ALWAYS_INLINE {
        if (grad_x) store(grad_x + i, v.grad_x, lanes);
        store(grad_residual + i, v.grad_residual, lanes);
      });
    } else {
      const auto factory = [=](Channels channels) SE_EXT_ALWAYS_INLINE {
        const PerChannel<layout, A> scale(scales, channels);
        const PerChannel<layout, A> mean(means, channels);
        return [=](std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
          const Vec<A> s = scale.at(c, lanes);
          return multiply_add(gv.at(i, s, lanes), s, mean.at(c, lanes));
        };
      };
      write_tile<layout, kCheap>(slab, tile, grad_x, b.streaming, factory);
    }
  });
}

}  // namespace se_ext::cpu::SE_EXT_ISA
