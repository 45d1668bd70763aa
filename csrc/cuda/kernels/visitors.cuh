// What the passes over the map do at each access. The formulas are in ../launch.h.
#pragma once

#include "activations.cuh"
#include "traverse.cuh"

namespace se_ext::cuda {

struct Nothing {};

template <class T>
struct SumInput {
  using value_type = T;
  using A = acc_t<T>;
  static constexpr int kParts = 1, kMaps = 1, kBlocks = 1, kAhead = 4;
  const T* x;

  template <int n, class Channels>
  SE_EXT_DEVICE Nothing prepare(std::int64_t, Channels) const {
    return {};
  }
  template <int n>
  SE_EXT_DEVICE Raw<T, n> load(std::int64_t, std::int64_t at) const {
    return load_raw<n>(x + at);
  }
  SE_EXT_DEVICE void begin_at(std::int64_t i) { x += i; }
  template <class F>
  SE_EXT_DEVICE void each_map(const F& f) {
    f(x, 0);
  }
  template <int n>
  SE_EXT_DEVICE void add(const Raw<T, n>& raw, Nothing, Lanes<A, n>* sums) const {
    const Lanes<A, n> value = widen<n>(raw);
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) sums[0][j] += value[j];
  }
};

template <class T>
struct SumPrologue : SumInput<T> {
  using A = acc_t<T>;
  const A *a, *b;
  Any pre;

  template <int n>
  struct Prepared {
    Lanes<A, n> a, b;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Prepared<n> prepare(std::int64_t, Channels channels) const {
    return {per_channel<n>(a, 0, channels), per_channel<n>(b, 0, channels)};
  }
  template <int n>
  SE_EXT_DEVICE void add(const Raw<T, n>& raw, const Prepared<n>& p, Lanes<A, n>* sums) const {
    Lanes<A, n> u = widen<n>(raw);
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) u[j] = multiply_add(p.a[j], u[j], p.b[j]);
    activate<kIsHalf<T>>(pre, u);
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) sums[0][j] += u[j];
  }
};

template <class T>
struct SumMoments : SumInput<T> {
  using A = acc_t<T>;
  static constexpr int kParts = 2;
  std::int64_t slab, channel_step;  // from a sample, a channel to the next one

  template <int n>
  SE_EXT_DEVICE Lanes<A, n> prepare(std::int64_t sample, Same channels) const {
    const A origin = se_ext::cuda::load<1>(this->x + sample * slab + channels.channel * channel_step)[0];
    return lanes<A, n>([&](int) { return origin; });
  }
  template <int n>
  SE_EXT_DEVICE Lanes<A, n> prepare(std::int64_t sample, Consecutive channels) const {
    return se_ext::cuda::load<n>(this->x + sample * slab + channels.channel);
  }
  template <int n>
  SE_EXT_DEVICE void add(const Raw<T, n>& raw, const Lanes<A, n>& origin, Lanes<A, n>* sums) const {
    const Lanes<A, n> value = widen<n>(raw);
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) {
      const A off = value[j] - origin[j];
      sums[0][j] += off;
      sums[1][j] = multiply_add(off, off, sums[1][j]);
    }
  }
};

template <class T, class Post>
struct WriteRescale {
  using value_type = T;
  using A = acc_t<T>;
  static constexpr int kAhead = 4;
  const T* x;
  const A* scale;
  const T* residual;
  T* y;
  Post post;
  std::int64_t channels;
  bool streaming;

  template <int n>
  struct Loaded {
    Raw<T, n> x, residual;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Lanes<A, n> prepare(std::int64_t sample, Channels c) const {
    return per_channel<n>(scale, sample * channels, c);
  }
  template <class F>
  SE_EXT_DEVICE void each_map(const F& f) {
    f(x, 0);
  }
  template <int n>
  SE_EXT_DEVICE Loaded<n> load(std::int64_t i, std::int64_t at) const {
    Loaded<n> raw;
    raw.x = load_raw<n>(x + at);
    if (residual) raw.residual = load_raw<n>(residual + i);
    return raw;
  }
  template <int n>
  SE_EXT_DEVICE void write(std::int64_t i, const Loaded<n>& raw, const Lanes<A, n>& s) const {
    Lanes<A, n> v = widen<n>(raw.x);
    if (residual) {
      const Lanes<A, n> r = widen<n>(raw.residual);
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) v[j] = multiply_add(s[j], v[j], r[j]);
    } else {
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) v[j] = s[j] * v[j];
    }
    activate<kIsHalf<T>>(post, v);
    store(y + i, v, streaming);
  }
};

template <class T, class Pre, class Post>
struct WritePrologueRescale : WriteRescale<T, Post> {
  using Base = WriteRescale<T, Post>;
  using A = acc_t<T>;
  template <int n>
  using Loaded = typename Base::template Loaded<n>;
  const A *a, *b, *drop;
  Pre pre;

  template <int n>
  struct Prepared {
    Lanes<A, n> a, b, scale;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Prepared<n> prepare(std::int64_t sample, Channels c) const {
    Prepared<n> p{per_channel<n>(a, 0, c), per_channel<n>(b, 0, c), Base::template prepare<n>(sample, c)};
    if (drop) {
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) p.scale[j] *= drop[sample];
    }
    return p;
  }
  template <int n>
  SE_EXT_DEVICE void write(std::int64_t i, const Loaded<n>& raw, const Prepared<n>& p) const {
    Lanes<A, n> v = widen<n>(raw.x);
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) v[j] = multiply_add(p.a[j], v[j], p.b[j]);
    activate<kIsHalf<T>>(pre, v);
    if (this->residual) {
      const Lanes<A, n> r = widen<n>(raw.residual);
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) v[j] = multiply_add(p.scale[j], v[j], r[j]);
    } else {
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) v[j] = p.scale[j] * v[j];
    }
    activate<kIsHalf<T>>(this->post, v);
    store(this->y + i, v, this->streaming);
  }
};

// f.template operator()<part>(first) for one part of an access, of up to `most` values, after the other: what lies
// between the loads and the results for all eight values of a half type would need more registers than two thread
// blocks of a multiprocessor have.
template <int n, int most, class F>
SE_EXT_DEVICE void in_parts(const F& f) {
  constexpr int part = n < most ? n : most;
  SE_EXT_UNROLL
  for (int first = 0; first < n; first += part) f.template operator()<part>(first);
}

// What the two passes of a backward share: the maps they read, and gv = g ⊙ post'(v).
template <class T, class Post>
struct Gradient {
  using value_type = T;
  using A = acc_t<T>;
  static constexpr int kMaps = 3, kAhead = 2;
  const T *grad, *x, *saved;  // saved: the output where post's slope follows from it, else the residual
  Post post;
  bool reads_output;

  template <int n>
  struct Loaded {
    Raw<T, n> grad, x, saved;
  };
  template <int n>
  SE_EXT_DEVICE Loaded<n> load(std::int64_t, std::int64_t at) const {
    Loaded<n> raw;
    raw.grad = load_raw<n>(grad + at);
    raw.x = load_raw<n>(x + at);
    if constexpr (!Post::kIdentity) {
      if (saved) raw.saved = load_raw<n>(saved + at);
    }
    return raw;
  }
  SE_EXT_DEVICE void begin_at(std::int64_t i) {
    grad += i;
    x += i;
    if (saved) saved += i;
  }
  template <class F>
  SE_EXT_DEVICE void each_map(const F& f) {
    f(grad, 0);
    f(x, 1);
    if (saved) f(saved, 2);
  }
  template <int part, int n>
  SE_EXT_DEVICE static Loaded<part> part_of(const Loaded<n>& raw, int first) {
    return {slice<part>(raw.grad, first), slice<part>(raw.x, first), slice<part>(raw.saved, first)};
  }
  // u is x, or what the prologue made of it
  template <int n>
  SE_EXT_DEVICE Lanes<A, n> before_post(const Loaded<n>& raw, const Lanes<A, n>& u, const Lanes<A, n>& scale) const {
    Lanes<A, n> gv = widen<n>(raw.grad);
    if constexpr (!Post::kIdentity) {
      if (saved && reads_output) {
        const Lanes<A, n> y = widen<n>(raw.saved);
        multiply_by_slope<kIsHalf<T>>(post, gv, y, y);
      } else {
        Lanes<A, n> v;
        if (saved) {
          const Lanes<A, n> r = widen<n>(raw.saved);
          SE_EXT_UNROLL
          for (int j = 0; j < n; ++j) v[j] = multiply_add(scale[j], u[j], r[j]);
        } else {
          SE_EXT_UNROLL
          for (int j = 0; j < n; ++j) v[j] = scale[j] * u[j];
        }
        Lanes<A, n> y = v;
        if (reads_output) activate<kIsHalf<T>>(post, y);
        multiply_by_slope<kIsHalf<T>>(post, gv, v, y);
      }
    }
    return gv;
  }
};

template <class T, class Post>
struct SumRescaleBackward : Gradient<T, Post> {
  using A = acc_t<T>;
  static constexpr int kParts = 1, kBlocks = sizeof(T) == 8 ? 1 : 2;
  template <int n>
  using Loaded = typename Gradient<T, Post>::template Loaded<n>;
  const A* scale;
  std::int64_t channels;

  template <int n, class Channels>
  SE_EXT_DEVICE Lanes<A, n> prepare(std::int64_t sample, Channels c) const {
    return per_channel<n>(scale, sample * channels, c);
  }
  template <int n>
  SE_EXT_DEVICE void add(const Loaded<n>& raw, const Lanes<A, n>& s, Lanes<A, n>* sums) const {
    in_parts<n, 2>([&]<int part>(int first) {
      const Lanes<A, part> x = widen<part>(slice<part>(raw.x, first));
      const Lanes<A, part> gv =
          this->template before_post<part>(this->template part_of<part>(raw, first), x, slice<part>(s, first));
      SE_EXT_UNROLL
      for (int j = 0; j < part; ++j) sums[0][first + j] = multiply_add(gv[j], x[j], sums[0][first + j]);
    });
  }
};

template <class T, class Post>
struct WriteRescaleBackward : Gradient<T, Post> {
  using A = acc_t<T>;
  template <int n>
  using Loaded = typename Gradient<T, Post>::template Loaded<n>;
  const A *scale, *grad_mean;
  T *grad_x, *grad_residual;
  std::int64_t channels;
  bool streaming;

  template <int n>
  struct Prepared {
    Lanes<A, n> scale, grad_mean;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Prepared<n> prepare(std::int64_t sample, Channels c) const {
    return {per_channel<n>(scale, sample * channels, c), per_channel<n>(grad_mean, sample * channels, c, A(0))};
  }
  template <int n>
  SE_EXT_DEVICE void write(std::int64_t i, const Loaded<n>& raw, const Prepared<n>& p) const {
    Lanes<A, n> gv, gx;
    in_parts<n, 2>([&]<int part>(int first) {
      const auto of_part = this->template part_of<part>(raw, first);
      const Lanes<A, part> scale = slice<part>(p.scale, first);
      const Lanes<A, part> g = this->template before_post<part>(of_part, widen<part>(of_part.x), scale);
      SE_EXT_UNROLL
      for (int j = 0; j < part; ++j) {
        gv[first + j] = g[j];
        gx[first + j] = multiply_add(g[j], scale[j], p.grad_mean[first + j]);
      }
    });
    if (grad_residual) store(grad_residual + i, gv, streaming);
    if (grad_x) store(grad_x + i, gx, streaming);
  }
};

// What the two passes behind a prologue share.
template <class T, class Pre, class Post>
struct PrologueGradient : Gradient<T, Post> {
  using A = acc_t<T>;
  template <int n>
  using Loaded = typename Gradient<T, Post>::template Loaded<n>;
  Pre pre;
  const A *a, *b, *scale, *drop;
  std::int64_t channels;

  template <int n>
  struct Prepared {
    Lanes<A, n> a, b, scale;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Prepared<n> prepare_prologue(std::int64_t sample, Channels c) const {
    Prepared<n> p{per_channel<n>(a, 0, c), per_channel<n>(b, 0, c), per_channel<n>(scale, sample * channels, c)};
    if (drop) {
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) p.scale[j] *= drop[sample];
    }
    return p;
  }
  // at one access: p = a ⊙ x + b, u = pre(p), gv
  template <int n>
  struct Values {
    Lanes<A, n> x, p, u, gv;
  };
  template <int n>
  SE_EXT_DEVICE Values<n> values(const Loaded<n>& raw, const Prepared<n>& of) const {
    Values<n> v;
    v.x = widen<n>(raw.x);
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) v.p[j] = multiply_add(of.a[j], v.x[j], of.b[j]);
    v.u = v.p;
    activate<kIsHalf<T>>(pre, v.u);
    v.gv = this->template before_post<n>(raw, v.u, of.scale);
    return v;
  }
};

template <class T, class Pre, class Post>
struct SumPrologueBackward : PrologueGradient<T, Pre, Post> {
  using Base = PrologueGradient<T, Pre, Post>;
  using A = acc_t<T>;
  static constexpr int kParts = Pre::kIdentity ? 2 : 5;
  static constexpr int kBlocks = sizeof(T) == 8 || (kIsHalf<T> && !Pre::kIdentity) ? 1 : 2;
  template <int n>
  using Loaded = typename Base::template Loaded<n>;
  const A* center;

  template <int n>
  struct Prepared {
    typename Base::template Prepared<n> prologue;
    Lanes<A, n> center;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Prepared<n> prepare(std::int64_t sample, Channels c) const {
    return {this->template prepare_prologue<n>(sample, c), per_channel<n>(center, 0, c, A(0))};
  }
  template <int n>
  SE_EXT_DEVICE void add(const Loaded<n>& raw, const Prepared<n>& of, Lanes<A, n>* sums) const {
    in_parts<n, (kBlocks > 1 ? 2 : n)>([&]<int part>(int first) {
      const auto v = this->template values<part>(this->template part_of<part>(raw, first),
                                                 {slice<part>(of.prologue.a, first), slice<part>(of.prologue.b, first),
                                                  slice<part>(of.prologue.scale, first)});
      const auto off = lanes<A, part>([&](int j) { return v.x[j] - of.center[first + j]; });
      const auto sum = [&](int which, int j) -> A& { return sums[which][first + j]; };
      if constexpr (Pre::kIdentity) {
        SE_EXT_UNROLL
        for (int j = 0; j < part; ++j) {
          sum(0, j) += v.gv[j];
          sum(1, j) = multiply_add(v.gv[j], off[j], sum(1, j));
        }
      } else {
        Lanes<A, part> gd = v.gv, d = lanes<A, part>([](int) { return A(1); });
        multiply_by_slope<kIsHalf<T>>(this->pre, gd, v.p, v.u);
        multiply_by_slope<kIsHalf<T>>(this->pre, d, v.p, v.u);
        SE_EXT_UNROLL
        for (int j = 0; j < part; ++j) {
          sum(0, j) = multiply_add(v.gv[j], v.u[j], sum(0, j));
          sum(1, j) += gd[j];
          sum(2, j) += d[j];
          sum(3, j) = multiply_add(gd[j], off[j], sum(3, j));
          sum(4, j) = multiply_add(d[j], off[j], sum(4, j));
        }
      }
    });
  }
};

template <class T, class Pre, class Post>
struct WritePrologueBackward : PrologueGradient<T, Pre, Post> {
  using Base = PrologueGradient<T, Pre, Post>;
  using A = acc_t<T>;
  template <int n>
  using Loaded = typename Base::template Loaded<n>;
  const A *grad_mean, *slope, *offset;
  T *grad_x, *grad_residual;
  bool streaming;

  template <int n>
  struct Prepared {
    typename Base::template Prepared<n> prologue;
    Lanes<A, n> grad_mean, slope, offset;
  };
  template <int n, class Channels>
  SE_EXT_DEVICE Prepared<n> prepare(std::int64_t sample, Channels c) const {
    return {this->template prepare_prologue<n>(sample, c), per_channel<n>(grad_mean, sample * this->channels, c, A(0)),
            per_channel<n>(slope, 0, c, A(0)), per_channel<n>(offset, 0, c, A(0))};
  }
  template <int n>
  SE_EXT_DEVICE void write(std::int64_t i, const Loaded<n>& raw, const Prepared<n>& of) const {
    Lanes<A, n> gv, gx;
    in_parts<n, 2>([&]<int part>(int first) {
      const auto g = gradients_of<part>(this->template part_of<part>(raw, first),
                                        {{slice<part>(of.prologue.a, first), slice<part>(of.prologue.b, first),
                                          slice<part>(of.prologue.scale, first)},
                                         slice<part>(of.grad_mean, first),
                                         slice<part>(of.slope, first),
                                         slice<part>(of.offset, first)});
      SE_EXT_UNROLL
      for (int j = 0; j < part; ++j) {
        gv[first + j] = g.residual[j];
        gx[first + j] = g.x[j];
      }
    });
    if (grad_residual) store(grad_residual + i, gv, streaming);
    if (grad_x) store(grad_x + i, gx, streaming);
  }

 private:
  template <int n>
  struct Gradients {
    Lanes<A, n> residual, x;
  };
  template <int n>
  SE_EXT_DEVICE Gradients<n> gradients_of(const Loaded<n>& raw, const Prepared<n>& of) const {
    const auto v = this->template values<n>(raw, of.prologue);
    auto gp = lanes<A, n>([&](int j) { return multiply_add(v.gv[j], of.prologue.scale[j], of.grad_mean[j]); });
    multiply_by_slope<kIsHalf<T>>(this->pre, gp, v.p, v.u);
    Gradients<n> g{v.gv, {}};
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) {
      g.x[j] = multiply_add(of.prologue.a[j], gp[j], of.offset[j]);
      // Apart: without statistics of the batch, an infinite x times a slope of zero must not count.
      if (slope) g.x[j] = multiply_add(of.slope[j], v.x[j], g.x[j]);
    }
    return g;
  }
};

}  // namespace se_ext::cuda
