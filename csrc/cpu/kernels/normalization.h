// The arithmetic of [C] and [N, C] vectors around a normalisation: a few operations per sample and channel. One body
// for every channel, so that a result does not depend on which samples or channels are asked for together.
#pragma once

#include <math.h>

#include "kernels.h"
#include "vec.h"

namespace se_ext::cpu::SE_EXT_ISA {

// The vectors of a Normalization, with its absent ones' values.
template <class A>
struct NormVectors {
  const A *weight_, *bias_, *mean_, *inverse_;

  explicit NormVectors(const Normalization& n)
      : weight_(static_cast<const A*>(n.weight)),
        bias_(static_cast<const A*>(n.bias)),
        mean_(static_cast<const A*>(n.mean)),
        inverse_(static_cast<const A*>(n.inverse)) {}

  A bias(std::int64_t c) const { return bias_ ? bias_[c] : A(0); }
  A mean(std::int64_t c) const { return mean_ ? mean_[c] : A(0); }
  A inverse(std::int64_t c) const { return mean_ ? inverse_[c] : A(1); }
  A a(std::int64_t c) const { return (weight_ ? weight_[c] : A(1)) * inverse(c); }
};

// Every sample's mean and m2 [N, C] → the batch's mean, biased variance and inverse standard deviation [C]. In double,
// by Chan's formula for all samples at once.
template <class A>
void batch_statistics(std::int64_t samples, std::int64_t channels, std::int64_t points, double eps,
                      const void* means_data, const void* m2s_data, void* mean_data, void* var_data,
                      void* inverse_data) {
  constexpr std::int64_t kBand = 64;  // channels at a time, whose sums stay in the first-level cache
  const A *means = static_cast<const A*>(means_data), *m2s = static_cast<const A*>(m2s_data);
  A *mean = static_cast<A*>(mean_data), *var = static_cast<A*>(var_data), *inverse = static_cast<A*>(inverse_data);
  const double N = static_cast<double>(samples), P = static_cast<double>(points);
  for (std::int64_t begin = 0; begin < channels; begin += kBand) {
    const std::int64_t count = min_of(kBand, channels - begin);
    double center[kBand] = {}, squares[kBand] = {};
    for (std::int64_t n = 0; n < samples; ++n) {
      for (std::int64_t i = 0; i < count; ++i) center[i] += static_cast<double>(means[n * channels + begin + i]);
    }
    for (std::int64_t i = 0; i < count; ++i) center[i] /= N;
    for (std::int64_t n = 0; n < samples; ++n) {
      for (std::int64_t i = 0; i < count; ++i) {
        const double off = static_cast<double>(means[n * channels + begin + i]) - center[i];
        squares[i] += static_cast<double>(m2s[n * channels + begin + i]) + P * off * off;
      }
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const double variance = squares[i] / (N * P);
      mean[begin + i] = static_cast<A>(center[i]);
      var[begin + i] = static_cast<A>(variance);
      inverse[begin + i] = static_cast<A>(1 / sqrt(variance + eps));
    }
  }
}

// a = weight · inverse, b = bias - mean · a        all [C]
template <class A>
void coefficients(const Normalization& norm, void* a_data, void* b_data) {
  A *a = static_cast<A*>(a_data), *b = static_cast<A*>(b_data);
  const NormVectors<A> v(norm);
  for (std::int64_t c = 0; c < norm.channels; ++c) {
    a[c] = v.a(c);
    b[c] = v.bias(c) - v.mean(c) * a[c];
  }
}

// z = a · (mean of the sample - mean) + bias, for one sample        the squeeze where pre is the identity
template <class A>
void squeeze_from_mean(const Normalization& norm, const void* mean_data, void* z_data) {
  const A* mean = static_cast<const A*>(mean_data);
  A* z = static_cast<A*>(z_data);
  const NormVectors<A> v(norm);
  for (std::int64_t c = 0; c < norm.channels; ++c) z[c] = v.a(c) * (mean[c] - v.mean(c)) + v.bias(c);
}

// out = values · factor · vector for one sample; a null vector is 1; out may be values
template <class A>
void product(std::int64_t channels, const void* values_data, const void* factor_data, const void* vector_data,
             void* out_data) {
  const A *values = static_cast<const A*>(values_data), *vector = static_cast<const A*>(vector_data);
  const A factor = factor_data ? *static_cast<const A*>(factor_data) : A(1);
  A* out = static_cast<A*>(out_data);
  if (vector) {
    for (std::int64_t c = 0; c < channels; ++c) out[c] = values[c] * factor * vector[c];
  } else {
    for (std::int64_t c = 0; c < channels; ++c) out[c] = values[c] * factor;
  }
}

// Where pre is the identity, u = a · (x - mean) + bias, and what is summed up of gv [2, C], one sample:
//   Σ gv ⊙ u = a · Σ gv ⊙ (x - mean) + bias · Σ gv        times the sample's drop, a null one being 1
template <class A>
void scale_gradient(const Normalization& norm, const void* sums_data, const void* drop_data, void* out_data) {
  const A* sums = static_cast<const A*>(sums_data);
  const A drop = drop_data ? *static_cast<const A*>(drop_data) : A(1);
  A* out = static_cast<A*>(out_data);
  const NormVectors<A> v(norm);
  for (std::int64_t c = 0; c < norm.channels; ++c) {
    out[c] = (v.a(c) * sums[norm.channels + c] + v.bias(c) * sums[c]) * drop;
  }
}

// … and of gu = gv ⊙ scale + grad_mean, in place of them:
//   Σ gu = scale · Σ gv + P · grad_mean
//   Σ gu ⊙ (x - mean) = scale · Σ gv ⊙ (x - mean) + P · grad_mean · (mean of the sample - mean)
template <class A>
void sums_behind_scale(const Normalization& norm, const void* scale_data, const void* grad_mean_data,
                       const void* sample_mean_data, void* sums_data) {
  const A *scale = static_cast<const A*>(scale_data), *grad_mean = static_cast<const A*>(grad_mean_data);
  const A* sample_mean = static_cast<const A*>(sample_mean_data);
  A *first = static_cast<A*>(sums_data), *second = first + norm.channels;
  const A points = static_cast<A>(norm.points);
  const NormVectors<A> v(norm);
  for (std::int64_t c = 0; c < norm.channels; ++c) {
    const A through_mean = points * grad_mean[c];
    first[c] = scale[c] * first[c] + through_mean;
    second[c] = scale[c] * second[c] + through_mean * (sample_mean[c] - v.mean(c));
  }
}

// Where pre is not the identity: what prologue_backward_sums sums up [5, C] → Σ gp and Σ gp ⊙ (x - mean), in place of
// the first two, one sample
template <class A>
void sums_behind_activation(std::int64_t channels, const void* scale_data, const void* grad_mean_data,
                            void* sums_data) {
  const A *scale = static_cast<const A*>(scale_data), *grad_mean = static_cast<const A*>(grad_mean_data);
  A* sums = static_cast<A*>(sums_data);
  for (std::int64_t c = 0; c < channels; ++c) {
    const A first = scale[c] * sums[channels + c] + grad_mean[c] * sums[2 * channels + c];
    const A second = scale[c] * sums[3 * channels + c] + grad_mean[c] * sums[4 * channels + c];
    sums[c] = first;
    sums[channels + c] = second;
  }
}

// Σ over the batch of the gradient at the affine map's output p, and of it times (x - mean), [2, C] →
//   the gradients of weight and bias, and the pass that writes, gx = a · gp + slope ⊙ x + offset:
//   slope = -a · inverse² · Σ gp ⊙ (x - mean) / NP,   offset = -a · Σ gp / NP - slope · mean
template <class A>
void backward_coefficients(const Normalization& norm, const void* totals_data, void* grad_weight_data, void* slope_data,
                           void* offset_data) {
  const A *first = static_cast<const A*>(totals_data), *second = first + norm.channels;
  A *grad_weight = static_cast<A*>(grad_weight_data), *slope = static_cast<A*>(slope_data),
    *offset = static_cast<A*>(offset_data);
  const A count = static_cast<A>(static_cast<double>(norm.samples) * static_cast<double>(norm.points));
  const NormVectors<A> v(norm);
  for (std::int64_t c = 0; c < norm.channels; ++c) {
    const A inverse = v.inverse(c), a = v.a(c);
    grad_weight[c] = second[c] * inverse;
    slope[c] = -a * inverse * inverse * second[c] / count;
    offset[c] = -a * first[c] / count - slope[c] * v.mean(c);
  }
}

// Where pre is the identity, the pass that writes in terms of gv, one sample: factor = scale · a,
// offset = grad_mean · a + the batch's offset (null: 0)
template <class A>
void offset_of_sample(std::int64_t channels, const void* grad_mean_data, const void* a_data,
                      const void* batch_offset_data, void* out_data) {
  const A *grad_mean = static_cast<const A*>(grad_mean_data), *a = static_cast<const A*>(a_data);
  const A* batch_offset = static_cast<const A*>(batch_offset_data);
  A* out = static_cast<A*>(out_data);
  for (std::int64_t c = 0; c < channels; ++c) out[c] = grad_mean[c] * a[c] + (batch_offset ? batch_offset[c] : A(0));
}

}  // namespace se_ext::cpu::SE_EXT_ISA
