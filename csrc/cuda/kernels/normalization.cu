// The vectors [C] and [N, C] around a normalisation: sums over the batch in a fixed order, in double.
#include "../launch.h"
#include "dense.cuh"
#include "launching.cuh"

namespace se_ext::cuda {
namespace {

constexpr int kColumns = 32;  // channels of a block, side by side
constexpr int kGroups = 8;    // of samples

// The vectors of a Normalization, with its absent ones' values.
template <class A>
struct Vectors {
  const A *weight_, *bias_, *mean_, *inverse_;

  explicit Vectors(const Normalization& n)
      : weight_(static_cast<const A*>(n.weight)),
        bias_(static_cast<const A*>(n.bias)),
        mean_(static_cast<const A*>(n.mean)),
        inverse_(static_cast<const A*>(n.inverse)) {}

  SE_EXT_DEVICE A weight(std::int64_t c) const { return weight_ ? weight_[c] : A(1); }
  SE_EXT_DEVICE A bias(std::int64_t c) const { return bias_ ? bias_[c] : A(0); }
  SE_EXT_DEVICE A mean(std::int64_t c) const { return mean_ ? mean_[c] : A(0); }
  SE_EXT_DEVICE A inverse(std::int64_t c) const { return mean_ ? inverse_[c] : A(1); }
  SE_EXT_DEVICE A a(std::int64_t c) const { return weight(c) * inverse(c); }
};

// The groups' sums of a channel, in order, for all of its threads. Every thread of the block must come here.
SE_EXT_DEVICE double sum_groups(double mine) {
  double* shared = reinterpret_cast<double*>(dynamic_shared());  // [kGroups, kColumns]
  const int lane = static_cast<int>(threadIdx.x) % kColumns;
  shared[threadIdx.x] = mine;
  __syncthreads();
  double sum = shared[lane];
  for (int g = 1; g < kGroups; ++g) sum += shared[g * kColumns + lane];
  __syncthreads();
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kColumns* kGroups)
    statistics_kernel(const T* x, const acc_t<T>* sums, const acc_t<T>* weight, const acc_t<T>* bias,
                      acc_t<T>* sample_means, acc_t<T>* mean, acc_t<T>* var, acc_t<T>* inverse, acc_t<T>* a,
                      acc_t<T>* b, std::int64_t samples, std::int64_t channels, std::int64_t points,
                      std::int64_t channel_step, double eps) {
  using A = acc_t<T>;
  const int group = static_cast<int>(threadIdx.x) / kColumns;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool is_mine = c < channels && points > 0;
  const A length = static_cast<A>(points);
  const auto offset = [&](std::int64_t n) { return sums[2 * n * channels + c] / length; };  // from the origin
  double total = 0;
  if (is_mine) {
    for (std::int64_t n = group; n < samples; n += kGroups) {
      const A of_sample = load<1>(x + n * channels * points + c * channel_step)[0] + offset(n);
      sample_means[n * channels + c] = of_sample;
      total += static_cast<double>(of_sample);
    }
  }
  const double center = sum_groups(total) / static_cast<double>(samples);
  double squares = 0;
  if (is_mine) {
    for (std::int64_t n = group; n < samples; n += kGroups) {
      const A around_own = sums[(2 * n + 1) * channels + c] - sums[2 * n * channels + c] * offset(n);
      const double off = static_cast<double>(sample_means[n * channels + c]) - center;
      squares += (around_own < 0 ? 0.0 : static_cast<double>(around_own)) + static_cast<double>(points) * off * off;
    }
  }
  const double variance = sum_groups(squares) / (static_cast<double>(samples) * static_cast<double>(points));
  if (c >= channels || group != 0) return;
  const A m = static_cast<A>(points > 0 ? center : 0.0 / static_cast<double>(points));
  const A i = static_cast<A>(1 / sqrt(variance + eps));
  const A scale = (weight ? weight[c] : A(1)) * i;
  mean[c] = m;
  var[c] = static_cast<A>(variance);
  inverse[c] = i;
  a[c] = scale;
  b[c] = (bias ? bias[c] : A(0)) - m * scale;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    squeeze_kernel(Vectors<A> v, const A* sample_means, A* z, std::int64_t items, std::int64_t channels) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= items) return;
  const std::int64_t c = i % channels;
  z[i] = v.a(c) * (sample_means[i] - v.mean(c)) + v.bias(c);
}

template <class A>
__global__ void __launch_bounds__(kThreads) coefficients_kernel(Vectors<A> v, A* a, A* b, std::int64_t channels) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  a[c] = v.a(c);
  b[c] = v.bias(c) - v.mean(c) * a[c];
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(Activation gate, const A* grad, const A* scale, A* out, std::int64_t items) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < items) out[i] = gradient_one(gate, grad[i], scale[i], scale[i]);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    scale_gradient_kernel(Vectors<A> v, const A* sums, const A* scale, const A* drop, A* grad_t, Activation gate,
                          bool has_activation, std::int64_t items, std::int64_t channels) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= items) return;
  const std::int64_t n = i / channels, c = i - n * channels;
  A grad;  // Σ gv ⊙ u; where pre is the identity u = a · (x - mean) + bias
  if (has_activation) {
    grad = sums[5 * n * channels + c];
  } else {
    grad = v.a(c) * sums[(2 * n + 1) * channels + c] + v.bias(c) * sums[2 * n * channels + c];
  }
  if (drop) grad *= drop[n];
  grad_t[i] = gradient_one(gate, grad, scale[i], scale[i]);
}

// With d = 1 where pre is the identity, the sums of gp = (gv · scale + grad_mean) ⊙ d follow from those of one sample:
//   Σ gp = scale · Σ gv ⊙ d + grad_mean · Σ d
//   Σ gp ⊙ (x - mean) = scale · Σ gv ⊙ d ⊙ (x - mean) + grad_mean · Σ d ⊙ (x - mean)
template <class A>
__global__ void __launch_bounds__(kColumns* kGroups)
    batch_backward_kernel(Vectors<A> v, const A* sums, const A* scale, const A* drop, const A* grad_mean,
                          const A* sample_means, bool has_activation, A* grad_weight, A* grad_bias, A* slope, A* offset,
                          std::int64_t samples, std::int64_t channels, std::int64_t points) {
  const int group = static_cast<int>(threadIdx.x) / kColumns;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  double first = 0, second = 0;
  if (c < channels) {
    for (std::int64_t n = group; n < samples; n += kGroups) {
      const std::int64_t i = n * channels + c;
      const A s = drop ? scale[i] * drop[n] : scale[i];
      if (has_activation) {
        const A* of_sample = sums + 5 * n * channels + c;
        first += static_cast<double>(s * of_sample[channels] + grad_mean[i] * of_sample[2 * channels]);
        second += static_cast<double>(s * of_sample[3 * channels] + grad_mean[i] * of_sample[4 * channels]);
      } else {
        const A* of_sample = sums + 2 * n * channels + c;
        const A through_mean = static_cast<A>(points) * grad_mean[i];
        first += static_cast<double>(s * of_sample[0] + through_mean);
        second += static_cast<double>(s * of_sample[channels] + through_mean * (sample_means[i] - v.mean(c)));
      }
    }
  }
  first = sum_groups(first);
  second = sum_groups(second);
  if (c >= channels || group != 0) return;
  const double count = static_cast<double>(samples) * static_cast<double>(points);
  const double inverse = static_cast<double>(v.inverse(c)), a = static_cast<double>(v.a(c));
  const double k = -a * inverse * inverse * second / count;
  grad_weight[c] = static_cast<A>(second * inverse);
  grad_bias[c] = static_cast<A>(first);
  slope[c] = static_cast<A>(k);
  offset[c] = static_cast<A>(-a * first / count - k * static_cast<double>(v.mean(c)));
}

// f.template operator()<A>()
template <class F>
cudaError_t with_accumulator(bool is_double, const F& f) {
  return is_double ? f.template operator()<double>() : f.template operator()<float>();
}

constexpr std::size_t kGroupBytes = kColumns * kGroups * sizeof(double);

}  // namespace

cudaError_t batch_statistics(const Batch& batch, const void* x, const StatisticsVectors& s) {
  const auto [channels, points, layout] = batch.slab;
  const std::int64_t step = layout == Layout::ChannelsFirst ? points : 1;
  return with_type(batch.dtype, [&, channels = channels, points = points]<class T>(T) {
    using A = acc_t<T>;
    return launch(statistics_kernel<T>, divide_up(channels, kColumns), kColumns * kGroups, kGroupBytes, batch.stream,
                  static_cast<const T*>(x), static_cast<const A*>(s.sums), static_cast<const A*>(s.weight),
                  static_cast<const A*>(s.bias), static_cast<A*>(s.sample_means), static_cast<A*>(s.mean),
                  static_cast<A*>(s.var), static_cast<A*>(s.inverse), static_cast<A*>(s.a), static_cast<A*>(s.b),
                  batch.samples, channels, points, step, s.eps);
  });
}

cudaError_t squeeze_from_means(const Normalization& norm, bool is_double, const void* sample_means, void* z,
                               cudaStream_t stream) {
  const std::int64_t items = norm.samples * norm.channels;
  return with_accumulator(is_double, [&]<class A>() {
    return launch(squeeze_kernel<A>, divide_up(items, kThreads), kThreads, 0, stream, Vectors<A>(norm),
                  static_cast<const A*>(sample_means), static_cast<A*>(z), items, norm.channels);
  });
}

cudaError_t coefficients(const Normalization& norm, bool is_double, void* a, void* b, cudaStream_t stream) {
  return with_accumulator(is_double, [&]<class A>() {
    return launch(coefficients_kernel<A>, divide_up(norm.channels, kThreads), kThreads, 0, stream, Vectors<A>(norm),
                  static_cast<A*>(a), static_cast<A*>(b), norm.channels);
  });
}

cudaError_t gate_gradient(Activation gate, bool is_double, const void* grad, const void* scale, void* out,
                          std::int64_t first, std::int64_t items, cudaStream_t stream) {
  return with_accumulator(is_double, [&]<class A>() {
    return launch(gate_kernel<A>, divide_up(items, kThreads), kThreads, 0, stream, gate,
                  static_cast<const A*>(grad) + first, static_cast<const A*>(scale) + first,
                  static_cast<A*>(out) + first, items);
  });
}

cudaError_t scale_gradient(const Normalization& norm, bool is_double, const ScaleGradient& s, std::int64_t first,
                           std::int64_t samples, cudaStream_t stream) {
  const std::int64_t items = samples * norm.channels, parts = s.has_activation ? 5 : 2;
  return with_accumulator(is_double, [&]<class A>() {
    const std::int64_t begin = first * norm.channels;
    return launch(scale_gradient_kernel<A>, divide_up(items, kThreads), kThreads, 0, stream, Vectors<A>(norm),
                  static_cast<const A*>(s.sums) + parts * begin, static_cast<const A*>(s.scale) + begin,
                  s.drop ? static_cast<const A*>(s.drop) + first : nullptr, static_cast<A*>(s.grad_t) + begin, s.gate,
                  s.has_activation, items, norm.channels);
  });
}

cudaError_t batch_backward(const Normalization& norm, bool is_double, const BatchBackward& b, cudaStream_t stream) {
  return with_accumulator(is_double, [&]<class A>() {
    return launch(batch_backward_kernel<A>, divide_up(norm.channels, kColumns), kColumns * kGroups, kGroupBytes, stream,
                  Vectors<A>(norm), static_cast<const A*>(b.sums), static_cast<const A*>(b.scale),
                  static_cast<const A*>(b.drop), static_cast<const A*>(b.grad_mean),
                  static_cast<const A*>(b.sample_means), b.has_activation, static_cast<A*>(b.grad_weight),
                  static_cast<A*>(b.grad_bias), static_cast<A*>(b.slope), static_cast<A*>(b.offset), norm.samples,
                  norm.channels, norm.points);
  });
}

}  // namespace se_ext::cuda
