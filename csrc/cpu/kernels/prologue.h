// Kernels over the feature map behind a prologue: u = pre(a ⊙ x + b) takes the place of x. On one tile of one sample.
//
// Which activations are compiled in: a common one alone, behind the map (batch norm → SE → + shortcut → ReLU, and every
// batch norm without an SE block behind it) or in front of the scale (batch norm → SiLU → SE). Every other pair goes
// through a switch per register, and so does all of float64, which is for checking results, not for speed.
#pragma once

#include <type_traits>

#include "activations.h"
#include "traverse.h"
#include "write_tile.h"

namespace se_ext::cpu::SE_EXT_ISA {

template <Activation A>
struct Compiled {
  static constexpr bool kIdentity = A == Activation::Identity;
  static constexpr bool kCheap = is_cheap(A);
  static constexpr bool kSmooth = !kCheap;  // a gradient is multiplied by its slope; no kink stops it

  bool slope_from_output() const { return se_ext::slope_from_output(A); }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE V value(V v) const {
    return activate<A>(v);
  }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE void value_and_slope(V v, V& u, V& slope) const {
    SE_EXT_ISA::value_and_slope<A>(v, u, slope);
  }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE V gradient(V g, V q) const {
    return SE_EXT_ISA::gradient<A>(g, q);
  }
};

template <class V>
__attribute__((noinline)) static V activate_any(Activation a, V v) {
  V u{};
  dispatch(a, [&](auto of) SE_EXT_ALWAYS_INLINE { u = activate<of.value>(v); });
  return u;
}
template <class V>
__attribute__((noinline)) static V gradient_any(Activation a, V g, V q) {
  V result{};
  dispatch(a, [&](auto of) SE_EXT_ALWAYS_INLINE { result = gradient<of.value>(g, q); });
  return result;
}

struct Any {
  static constexpr bool kIdentity = false;
  static constexpr bool kCheap = false;
  static constexpr bool kSmooth = false;
  Activation activation;

  bool slope_from_output() const { return se_ext::slope_from_output(activation); }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE V value(V v) const {
    return activate_any(activation, v);
  }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE V gradient(V g, V q) const {
    return gradient_any(activation, g, q);
  }
};

template <class T>
inline constexpr bool kSwitchAlone = sizeof(acc_t<T>) == sizeof(double);

// f(pre), where pre is not the identity and post is
template <class T, class F>
SE_EXT_INLINE void dispatch_pre(Activation pre, F&& f) {
  if constexpr (!kSwitchAlone<T>) {
    if (pre == Activation::Relu) return f(Compiled<Activation::Relu>{});
    if (pre == Activation::Silu) return f(Compiled<Activation::Silu>{});
    if (pre == Activation::Hardswish) return f(Compiled<Activation::Hardswish>{});
  }
  return f(Any{pre});
}

// f.operator()<layout>(pre, post), where pre is not the identity
template <class T, class F>
SE_EXT_INLINE void dispatch_behind_activation(Layout layout, Activation pre, Activation post, F&& f) {
  using Identity = Compiled<Activation::Identity>;
  dispatch_layout(layout, [&]<Layout l>() {
    if (post != Activation::Identity) return f.template operator()<l>(Any{pre}, Any{post});
    dispatch_pre<T>(pre, [&](auto compiled) { f.template operator()<l>(compiled, Identity{}); });
  });
}

// f.operator()<layout>(pre, post)
template <class T, class F>
SE_EXT_INLINE void dispatch_prologue(Layout layout, Activation pre, Activation post, F&& f) {
  using Identity = Compiled<Activation::Identity>;
  if (pre != Activation::Identity) return dispatch_behind_activation<T>(layout, pre, post, f);
  dispatch_layout(layout, [&]<Layout l>() {
    if (post == Activation::Identity) return f.template operator()<l>(Identity{}, Identity{});
    if constexpr (!kSwitchAlone<T>) {
      if (post == Activation::Relu) return f.template operator()<l>(Identity{}, Compiled<Activation::Relu>{});
      if (post == Activation::Relu6) return f.template operator()<l>(Identity{}, Compiled<Activation::Relu6>{});
      if (post == Activation::Silu) return f.template operator()<l>(Identity{}, Compiled<Activation::Silu>{});
      if (post == Activation::Hardswish) return f.template operator()<l>(Identity{}, Compiled<Activation::Hardswish>{});
    }
    return f.template operator()<l>(Identity{}, Any{post});
  });
}

// Σ_p (x - origin) and Σ_p (x - origin)², origin being the channel's first point: sums [2, C].
template <class T>
void moments(const Slab& slab, Tile tile, const void* x_data, void* sums) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(x_data);
  dispatch_layout(slab.layout, [&]<Layout layout>() {
    sum_tile<layout>(slab, tile, static_cast<A*>(sums), [=](Channels channels) SE_EXT_ALWAYS_INLINE {
      const FirstPoint<layout, T> origin(x, slab, channels);
      return [=](std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
        const Vec<A> d = load(x + i, lanes) - origin.at(c, lanes);
        return Sums<A, 2>{{d, d * d}};
      };
    });
  });
}

// The sums that moments left [2, C] → mean [C] and m2 [C] = Σ_p (x - mean)².
template <class T>
void finish_moments(const Slab& slab, const void* x_data, const void* sums_data, void* mean_data, void* m2_data) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(x_data);
  const A* sums = static_cast<const A*>(sums_data);
  A *mean = static_cast<A*>(mean_data), *m2 = static_cast<A*>(m2_data);
  const A points = static_cast<A>(slab.points);
  const std::int64_t step = slab.layout == Layout::ChannelsFirst ? slab.points : 1;
  for (std::int64_t c = 0; c < slab.channels; ++c) {
    const A off = sums[c] / points;
    const A squares = sums[slab.channels + c] - sums[c] * off;
    mean[c] = load_one(x + c * step) + off;
    m2[c] = squares < 0 ? 0 : squares;
  }
}

// sums[c] = Σ_p u; where `u` is not null, u itself is written there too
template <class T>
void prologue_squeeze(const Slab& slab, Tile tile, const PrologueMap& m, void* u_data, void* sums) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(m.x);
  const A *as = static_cast<const A*>(m.a), *bs = static_cast<const A*>(m.b);
  T* to = static_cast<T*>(u_data);
  dispatch_behind_activation<T>(slab.layout, m.pre, Activation::Identity, [&]<Layout layout>(auto pre, auto) {
    constexpr bool kCheap = decltype(pre)::kCheap;
    sum_tile<layout, kCheap>(slab, tile, static_cast<A*>(sums), [=](Channels channels) SE_EXT_ALWAYS_INLINE {
      const PerChannel<layout, A> a(as, channels), b(bs, channels);
      return [=](std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
        const Vec<A> u = pre.value(multiply_add(a.at(c, lanes), load(x + i, lanes), b.at(c, lanes)));
        if (to) store(to + i, u, lanes);
        return u;
      };
    });
  });
}

// scale ⊙ u + residual at one register. Where pre is the identity, u holds the scale.
template <class Pre, class V, class Scale, class HasResidual, class T, class L>
SE_EXT_INLINE V rescaled_sum(V u, const Scale& scale, std::int64_t c, HasResidual has_residual, const T* residual,
                             std::int64_t i, L lanes) {
  if constexpr (Pre::kIdentity) {
    return has_residual ? u + load(residual + i, lanes) : u;
  } else {
    const V s = scale.at(c, lanes);
    return has_residual ? multiply_add(s, u, load(residual + i, lanes)) : s * u;
  }
}

// y = post(scale ⊙ u + residual)
template <class T>
void prologue_rescale(const Slab& slab, Tile tile, const PrologueRescale& r) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(r.map.x);
  const A *as = static_cast<const A*>(r.map.a), *bs = static_cast<const A*>(r.map.b);
  const A* scales = static_cast<const A*>(r.scale);
  const T* residual = static_cast<const T*>(r.residual);
  T* y = static_cast<T*>(r.y);
  dispatch_prologue<T>(slab.layout, r.map.pre, r.post, [&]<Layout layout>(auto pre, auto post) {
    using Pre = decltype(pre);
    const auto factory = [=](Channels channels) SE_EXT_ALWAYS_INLINE {
      const PerChannel<layout, A> a(as, channels), b(bs, channels), scale(Pre::kIdentity ? nullptr : scales, channels);
      return [=](std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
        const Vec<A> u = pre.value(multiply_add(a.at(c, lanes), load(x + i, lanes), b.at(c, lanes)));
        return post.value(rescaled_sum<Pre>(u, scale, c, residual != nullptr, residual, i, lanes));
      };
    };
    write_tile<layout, Pre::kCheap&& decltype(post)::kCheap>(slab, tile, y, r.streaming, factory);
  });
}

// f(has_saved), a bool that is compiled in where post is.
template <class Post, class F>
SE_EXT_INLINE void dispatch_saved(const PrologueBackward& r, F&& f) {
  const bool has_saved = r.saved;
  if constexpr (Post::kIdentity) {
    f(std::false_type{});
  } else if constexpr (!Post::kCheap) {
    f(has_saved);
  } else {
    has_saved ? f(std::true_type{}) : f(std::false_type{});
  }
}

// gv = g ⊙ post'(v) at one register, and what lies on the way to it.
template <class T, Layout layout, class Pre, class Post, class HasSaved>
struct PrologueGradient {
  using A = acc_t<T>;
  struct Values {
    Vec<A> x, p, u, slope, gv;  // p = a ⊙ x + b, slope = pre'(p) where pre is smooth; only what is used costs anything
  };

  Pre pre;
  Post post;
  HasSaved has_saved;
  const T *grad, *x, *saved;
  PerChannel<layout, A> a, b, scale;

  SE_EXT_ALWAYS_INLINE PrologueGradient(Pre before, Post after, HasSaved is_saved, const PrologueBackward& r,
                                        Channels channels)
      : pre(before),
        post(after),
        has_saved(is_saved),
        grad(static_cast<const T*>(r.grad)),
        x(static_cast<const T*>(r.map.x)),
        saved(static_cast<const T*>(r.saved)),
        a(static_cast<const A*>(r.map.a), channels),
        b(static_cast<const A*>(r.map.b), channels),
        scale(Pre::kIdentity ? nullptr : static_cast<const A*>(r.scale), channels) {}

  template <class L>
  inline SE_EXT_ALWAYS_INLINE Values at(std::int64_t i, std::int64_t c, L lanes) const {
    Values r{};
    r.x = load(x + i, lanes);
    r.p = multiply_add(a.at(c, lanes), r.x, b.at(c, lanes));
    if constexpr (Pre::kSmooth) {
      pre.value_and_slope(r.p, r.u, r.slope);
    } else {
      r.u = pre.value(r.p);
    }
    const Vec<A> g = load(grad + i, lanes);
    if constexpr (Post::kIdentity) {
      r.gv = g;
    } else if (has_saved && post.slope_from_output()) {
      r.gv = post.gradient(g, load(saved + i, lanes));
    } else {
      const Vec<A> v = rescaled_sum<Pre>(r.u, scale, c, has_saved, saved, i, lanes);
      r.gv = post.gradient(g, post.slope_from_output() ? post.value(v) : v);
    }
    return r;
  }

  // g ⊙ pre'(p)
  inline SE_EXT_ALWAYS_INLINE Vec<A> gradient_of_pre(Vec<A> g, const Values& r) const {
    if constexpr (Pre::kSmooth) {
      return g * r.slope;
    } else {
      return pre.gradient(g, pre.slope_from_output() ? r.u : r.p);
    }
  }

  // The gradient that reaches p, given the one that comes back through the squeeze: gv itself where pre is the
  // identity, because its scale and that gradient are in the factor and the offset of the pass that writes.
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<A> at_p(const Values& r, const PerChannel<layout, A>& mean, std::int64_t c,
                                          L lanes) const {
    if constexpr (Pre::kIdentity) {
      return r.gv;
    } else {
      return gradient_of_pre(multiply_add(r.gv, scale.at(c, lanes), mean.at(c, lanes)), r);
    }
  }
};

// What happens to a register's pre'(p) and gv while they are summed up: see PrologueBackward::leaves_slopes.
struct KeepNothing {
  template <class V, class L>
  inline SE_EXT_ALWAYS_INLINE void operator()(std::int64_t, V, V, L) const {}
};
template <class Write>
struct KeepGradient {
  Write write;
  template <class V, class L>
  inline SE_EXT_ALWAYS_INLINE void operator()(std::int64_t i, V, V gv, L lanes) const {
    write(i, gv, lanes);
  }
};
template <class T>
struct KeepWhatIsAsked {
  T *slopes, *gradients;
  template <class V, class L>
  inline SE_EXT_ALWAYS_INLINE void operator()(std::int64_t i, V slope, V gv, L lanes) const {
    if (slopes) store(slopes + i, slope, lanes);
    if (gradients) store(gradients + i, gv, lanes);
  }
};

template <class T, class Pre, class Post, class F>
SE_EXT_INLINE void dispatch_leaving(const Slab& slab, Tile tile, const PrologueBackward& r, F&& f) {
  T* gradients = static_cast<T*>(r.grad_residual);
  if constexpr (Pre::kIdentity && Post::kCheap) {  // waits for memory alone: a branch at every store would cost
    if constexpr (!Post::kIdentity) {
      if (r.leaves_slopes && r.streaming && rows_are_aligned(slab, tile, gradients)) {
        f(KeepGradient<PastCache<T>>{{gradients}});
        return fence_streams();
      }
      if (r.leaves_slopes) return f(KeepGradient<ToCache<T>>{{gradients}});
    }
    return f(KeepNothing{});
  } else {
    T* slopes = static_cast<T*>(r.grad_x);
    return f(KeepWhatIsAsked<T>{r.leaves_slopes && !Pre::kIdentity ? slopes : nullptr,
                                r.leaves_slopes && r.post != Activation::Identity ? gradients : nullptr});
  }
}

// All sums that backward needs, in one pass. Where pre is the identity, [2, C]:
//   Σ_p gv        Σ_p gv ⊙ (x - center)
// else, with d = pre'(p), [5, C]:
//   Σ_p gv ⊙ u        Σ_p gv ⊙ d        Σ_p d        Σ_p gv ⊙ d ⊙ (x - center)        Σ_p d ⊙ (x - center)
// from which follow the gradient of the scale and, once grad_mean is known, the sums of gp = (gv ⊙ scale + grad_mean) ⊙
// d.
template <class T>
void prologue_backward_sums(const Slab& slab, Tile tile, const PrologueBackward& r, void* sums) {
  using A = acc_t<T>;
  dispatch_prologue<T>(slab.layout, r.map.pre, r.post, [&]<Layout layout>(auto pre, auto post) {
    using Pre = decltype(pre);
    using Post = decltype(post);
    dispatch_saved<Post>(r, [&](auto has_saved) SE_EXT_ALWAYS_INLINE {
      dispatch_leaving<T, Pre, Post>(slab, tile, r, [&](auto keep) SE_EXT_ALWAYS_INLINE {
        using Gradient = PrologueGradient<T, layout, Pre, Post, decltype(has_saved)>;
        sum_tile<layout>(slab, tile, static_cast<A*>(sums), [&](Channels channels) SE_EXT_ALWAYS_INLINE {
          return [keep, gradient = Gradient(pre, post, has_saved, r, channels),
                  center = PerChannel<layout, A>(static_cast<const A*>(r.center), channels)](
                     std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
            const auto found = gradient.at(i, c, lanes);
            const Vec<A> off = found.x - center.at(c, lanes);
            if constexpr (Pre::kIdentity) {
              keep(i, found.gv, found.gv, lanes);
              return Sums<A, 2>{{found.gv, found.gv * off}};
            } else {
              const Vec<A> gd = gradient.gradient_of_pre(found.gv, found);
              const Vec<A> d = gradient.gradient_of_pre(broadcast<A>(1), found);
              keep(i, d, found.gv, lanes);
              return Sums<A, 5>{{found.gv * found.u, gd, d, gd * off, d * off}};
            }
          };
        });
      });
    });
  });
}

// grad_x where the sums left gv and the slopes
template <class T, Layout layout, bool kSlopes>
SE_EXT_INLINE void prologue_backward_finish(const Slab& slab, Tile tile, const PrologueBackward& r) {
  using A = acc_t<T>;
  const T* gradients = static_cast<const T*>(r.post == Activation::Identity ? r.grad : r.grad_residual);
  const T* x = static_cast<const T*>(r.map.x);
  T* grad_x = static_cast<T*>(r.grad_x);
  const auto vector = [](const void* values) { return static_cast<const A*>(values); };
  const bool has_slope = r.slope;
  const auto factory = [&](Channels channels) SE_EXT_ALWAYS_INLINE {
    return [=, scale = PerChannel<layout, A>(kSlopes ? vector(r.scale) : nullptr, channels),
            mean = PerChannel<layout, A>(kSlopes ? vector(r.grad_mean) : nullptr, channels),
            factor = PerChannel<layout, A>(vector(r.factor), channels),
            slope = PerChannel<layout, A>(vector(r.slope), channels),
            offset = PerChannel<layout, A>(vector(r.offset), channels)](std::int64_t i, std::int64_t c, auto lanes)
               SE_EXT_ALWAYS_INLINE {
                 Vec<A> gp = load(gradients + i, lanes);
                 if constexpr (kSlopes) {
                   gp = multiply_add(gp, scale.at(c, lanes), mean.at(c, lanes)) * load(grad_x + i, lanes);
                 }
                 const Vec<A> gx = multiply_add(factor.at(c, lanes), gp, offset.at(c, lanes));
                 return has_slope ? multiply_add(slope.at(c, lanes), load(x + i, lanes), gx) : gx;
               };
  };
  // What was just read is in cache: there is nothing to gain from writing past it.
  write_tile<layout, true>(slab, tile, grad_x, r.streaming && !kSlopes, factory);
}

// grad_x = factor ⊙ gp + slope ⊙ x + offset, grad_residual = gv
template <class T>
void prologue_backward_apply(const Slab& slab, Tile tile, const PrologueBackward& r) {
  using A = acc_t<T>;
  if (r.leaves_slopes) {
    return dispatch_layout(slab.layout, [&]<Layout layout>() {
      if (r.map.pre == Activation::Identity) return prologue_backward_finish<T, layout, false>(slab, tile, r);
      if constexpr (sizeof(T) == sizeof(A)) prologue_backward_finish<T, layout, true>(slab, tile, r);
    });
  }
  T* grad_x = static_cast<T*>(r.grad_x);
  T* grad_residual = static_cast<T*>(r.grad_residual);
  const bool has_slope = r.slope;
  dispatch_prologue<T>(slab.layout, r.map.pre, r.post, [&]<Layout layout>(auto pre, auto post) {
    constexpr bool kCheap = decltype(pre)::kCheap && decltype(post)::kCheap;
    struct Both {
      Vec<A> grad_x, grad_residual;
    };
    dispatch_saved<decltype(post)>(r, [&](auto has_saved) SE_EXT_ALWAYS_INLINE {
      using Gradient = PrologueGradient<T, layout, decltype(pre), decltype(post), decltype(has_saved)>;
      const auto both = [&](Channels channels) SE_EXT_ALWAYS_INLINE {
        // In place: these are too many registers for the compiler to see through a copy.
        return [has_slope, gradient = Gradient(pre, post, has_saved, r, channels),
                mean = PerChannel<layout, A>(static_cast<const A*>(r.grad_mean), channels),
                factor = PerChannel<layout, A>(static_cast<const A*>(r.factor), channels),
                slope = PerChannel<layout, A>(static_cast<const A*>(r.slope), channels),
                offset = PerChannel<layout, A>(static_cast<const A*>(r.offset), channels)](
                   std::int64_t i, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
          const auto found = gradient.at(i, c, lanes);
          Vec<A> gx = multiply_add(factor.at(c, lanes), gradient.at_p(found, mean, c, lanes), offset.at(c, lanes));
          if (has_slope) gx = multiply_add(slope.at(c, lanes), found.x, gx);
          return Both{gx, found.gv};
        };
      };
      if (grad_residual) {
        visit_tile<layout, A, kCheap>(slab, tile, both, [=](std::int64_t i, Both v, auto lanes) SE_EXT_ALWAYS_INLINE {
          if (grad_x) store(grad_x + i, v.grad_x, lanes);
          store(grad_residual + i, v.grad_residual, lanes);
        });
      } else {
        const auto alone = [&](Channels channels) SE_EXT_ALWAYS_INLINE {
          return [compute = both(channels)](std::int64_t i, std::int64_t c, auto lanes)
                     SE_EXT_ALWAYS_INLINE { return compute(i, c, lanes).grad_x; };
        };
        write_tile<layout, kCheap>(slab, tile, grad_x, r.streaming, alone);
      }
    });
  });
}

}  // namespace se_ext::cpu::SE_EXT_ISA
