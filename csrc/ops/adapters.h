// What every op does on every backend, in one order: check, guard, allocate, run. Backend<Device> runs; the fake
// kernels (Fake: meta tensors, FakeTensorMode, torch.compile, torch.export) run nothing, so that the errors, shapes and
// strides of a traced graph are those of the real run.
#pragma once

#include <array>
#include <tuple>
#include <type_traits>

#include "allocate.h"
#include "checks.h"
#include "convolution.h"

namespace se_ext {

struct NoGuard {
  explicit NoGuard(const Tensor&) {}
};
struct Cpu {
  using Guard = NoGuard;
};
struct Cuda;  // cuda/device.h
struct Fake {
  using Guard = NoGuard;
};

template <std::size_t n>
using Gradients = std::array<Tensor, n>;

// What a batch norm that is training finds of its batch, [C]; of no elements otherwise.
struct Statistics {
  Tensor mean, var, inverse;
};

// What a device computes: one function an op, in <device>/<op>.cpp. Arguments are checked and activations parsed;
// outputs are allocated, uninitialised and in the map's layout, gradients that are not wanted undefined.
template <class Device>
struct Backend {
  static void squeeze(const ops::Squeeze& a, const Tensor& z);

  // hidden [N, M] is what the first layer gives, before its activation.
  static void excite(const ops::Excite& a, const ops::Activations& activations, const Tensor& scale,
                     const Tensor& hidden);
  static void excite_backward(const ops::ExciteBackward& a, const ops::Activations& activations,
                              const Gradients<5>& to);

  // y may be the input.
  static void rescale(const ops::Rescale& a, const ops::Activations& activations, const Tensor& y);
  static void rescale_backward(const ops::RescaleBackward& a, const ops::Activations& activations,
                               const Gradients<3>& to);

  // y may be the input; `saved` is null where nobody wants it.
  static void squeeze_excite(const ops::SqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                             const ops::SavedExcitation* saved);
  static void squeeze_excite_backward(const ops::SqueezeExciteBackward& a, const ops::Activations& activations,
                                      const Gradients<6>& to);

  // y may be the input. Fills `saved` and the variance.
  static void bn_squeeze_excite(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                                const ops::SavedBnSqueezeExcite& saved, const Tensor& var);
  static void bn_squeeze_excite_backward(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations,
                                         const Gradients<8>& to);

  // y may be the input.
  static void bn_activation(const ops::BnActivation& a, const ops::Activations& activations, const Tensor& y,
                            const Statistics& statistics);
  static void bn_activation_backward(const ops::BnActivationBackward& a, const ops::Activations& activations,
                                     const Gradients<4>& to);

  // Allocate for themselves, because they may call ATen's convolution: an output and a gradient in the input's layout.
  static Tensor depthwise_conv(const ops::DepthwiseConv& a);
  static Gradients<3> depthwise_conv_backward(const ops::DepthwiseConvBackward& a);
};

// Of forward's differentiable arguments: maps in the input's layout, weights contiguous.
template <class A, std::size_t n>
Gradients<n> empty_gradients(const A& forward, const std::array<bool, n>& mask) {
  Gradients<n> gradients;
  std::size_t i = 0;
  for_each_tensor(forward, [&](const TensorInfo& info, const Tensor* t) {
    if (!info.is_differentiable()) return;
    if (mask[i] && info.role != Role::Weight) {
      gradients[i] = empty_map_like(forward.input);
    } else if (mask[i] && t) {
      gradients[i] = at::empty_symint(t->sym_sizes(), t->options());
    }
    ++i;
  });
  return gradients;
}

template <class Device>
struct Adapters {
  using Run = Backend<Device>;
  using Guard = typename Device::Guard;
  static constexpr bool runs = !std::is_same_v<Device, Fake>;

  static Tensor squeeze(const ops::Squeeze& a) {
    a.check();
    const Guard guard(a.input);
    Tensor z = empty_matrix(a.input.sym_size(0), a.input.sym_size(1), a.input, a.input.scalar_type());
    if constexpr (runs) Run::squeeze(a, z);
    return z;
  }

  static std::tuple<Tensor, Tensor> excite_forward(const ops::Excite& a) {
    const ops::Activations activations = a.check();
    const Guard guard(a.input);
    const Tensor& z = a.input;
    Tensor scale = empty_matrix(z.sym_size(0), z.sym_size(1), z, z.scalar_type());
    Tensor hidden = empty_matrix(z.sym_size(0), a.excitation.w1.sym_size(0), z, accumulation_type(z.scalar_type()));
    if constexpr (runs) Run::excite(a, activations, scale, hidden);
    return {scale, hidden};
  }

  static Tensor excite(const ops::Excite& a) { return std::get<0>(excite_forward(a)); }

  static auto excite_backward(const ops::ExciteBackward& a) {
    return backward(a, [](const auto&... arguments) { Run::excite_backward(arguments...); });
  }

  static Tensor rescale(const ops::Rescale& a) {
    const ops::Activations activations = a.check();
    const Guard guard(a.input);
    Tensor y = empty_map_like(a.input);
    if constexpr (runs) Run::rescale(a, activations, y);
    return y;
  }

  static void rescale_in_place(const ops::Rescale& a) {
    const ops::Activations activations = checks::in_place(ops::rescale_.name, a);
    const Guard guard(a.input);
    if constexpr (runs) Run::rescale(a, activations, a.input);
  }

  static auto rescale_backward(const ops::RescaleBackward& a) {
    return backward(a, [](const auto&... arguments) { Run::rescale_backward(arguments...); });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_forward(const ops::SqueezeExcite& a) {
    const ops::Activations activations = a.check();
    const Guard guard(a.input);
    Tensor y = empty_map_like(a.input);
    Tensor z = saved_matrix(a.input, a.input.sym_size(1));
    Tensor hidden = saved_matrix(a.input, a.excitation.w1.sym_size(0));
    Tensor scale = saved_matrix(a.input, a.input.sym_size(1));
    const ops::SavedExcitation saved{z, hidden, scale};
    if constexpr (runs) Run::squeeze_excite(a, activations, y, &saved);
    return {y, z, hidden, scale};
  }

  static Tensor squeeze_excite(const ops::SqueezeExcite& a) {
    const ops::Activations activations = a.check();
    const Guard guard(a.input);
    Tensor y = empty_map_like(a.input);
    if constexpr (runs) Run::squeeze_excite(a, activations, y, nullptr);
    return y;
  }

  static void squeeze_excite_in_place(const ops::SqueezeExcite& a) {
    const ops::Activations activations = checks::in_place(ops::squeeze_excite_.name, a);
    const Guard guard(a.input);
    if constexpr (runs) Run::squeeze_excite(a, activations, a.input, nullptr);
  }

  static auto squeeze_excite_backward(const ops::SqueezeExciteBackward& a) {
    return backward(a, [](const auto&... arguments) { Run::squeeze_excite_backward(arguments...); });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_forward(
      const ops::BnSqueezeExcite& a) {
    const ops::Activations activations = a.check();
    const Guard guard(a.input);
    return bn_squeeze_excite_into(empty_map_like(a.input), a, activations);
  }

  static void bn_squeeze_excite_in_place(const ops::BnSqueezeExcite& a) {
    const ops::Activations activations = checks::in_place(ops::_bn_squeeze_excite_.name, a);
    const Guard guard(a.input);
    bn_squeeze_excite_into(a.input, a, activations);
  }

  static std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(const ops::BnSqueezeExcite& a) {
    const auto all = bn_squeeze_excite_forward(a);
    return {std::get<0>(all), std::get<1>(all), std::get<2>(all)};
  }

  static auto bn_squeeze_excite_backward(const ops::BnSqueezeExciteBackward& a) {
    return backward(a, [](const auto&... arguments) { Run::bn_squeeze_excite_backward(arguments...); });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const ops::BnActivation& a) {
    const ops::Activations activations = a.check();
    const Guard guard(a.input);
    Tensor y = empty_map_like(a.input);
    const Statistics statistics = empty_statistics(a.input, a.batch_statistics);
    if constexpr (runs) Run::bn_activation(a, activations, y, statistics);
    return {y, statistics.mean, statistics.var, statistics.inverse};
  }

  static void bn_activation_in_place(const ops::BnActivation& a) {
    const ops::Activations activations = checks::in_place(ops::_bn_activation_.name, a);
    const Guard guard(a.input);
    const Statistics statistics = empty_statistics(a.input, a.batch_statistics);
    if constexpr (runs) Run::bn_activation(a, activations, a.input, statistics);
  }

  static auto bn_activation_backward(const ops::BnActivationBackward& a) {
    return backward(a, [](const auto&... arguments) { Run::bn_activation_backward(arguments...); });
  }

  static Tensor depthwise_conv(const ops::DepthwiseConv& a) {
    a.check();
    const Guard guard(a.input);
    const auto sizes = convolved_sizes(a);
    if constexpr (runs) {
      if (c10::multiply_integers(sizes) != 0) return Run::depthwise_conv(a);
    }
    return empty_convolved(a);
  }

  static auto depthwise_conv_backward(const ops::DepthwiseConvBackward& a) {
    a.check();
    const Guard guard(a.forward.input);
    if constexpr (runs) {
      if (a.grad_output.numel() > 0) return std::tuple_cat(Run::depthwise_conv_backward(a));
    }
    const auto gradients = empty_gradients(a.forward, a.mask);
    if constexpr (runs) {
      for (const Tensor& gradient : gradients) {  // sums over nothing
        if (gradient.defined()) gradient.zero_();
      }
    }
    return std::tuple_cat(gradients);
  }

  static void register_all(torch::Library& m) {
    add<squeeze>(m, ops::squeeze);
    add<excite>(m, ops::excite);
    add<rescale>(m, ops::rescale);
    add<squeeze_excite>(m, ops::squeeze_excite);
    add<bn_squeeze_excite>(m, ops::bn_squeeze_excite);
    add<bn_activation>(m, ops::_bn_activation);
    add<depthwise_conv>(m, ops::depthwise_conv);
    add<rescale_in_place>(m, ops::rescale_);
    add<squeeze_excite_in_place>(m, ops::squeeze_excite_);
    add<bn_squeeze_excite_in_place>(m, ops::_bn_squeeze_excite_);
    add<bn_activation_in_place>(m, ops::_bn_activation_);
    add<excite_forward>(m, ops::_excite_forward);
    add<squeeze_excite_forward>(m, ops::_squeeze_excite_forward);
    add<bn_squeeze_excite_forward>(m, ops::_bn_squeeze_excite_forward);
    add<excite_backward>(m, ops::_excite_backward);
    add<rescale_backward>(m, ops::_rescale_backward);
    add<squeeze_excite_backward>(m, ops::_squeeze_excite_backward);
    add<bn_squeeze_excite_backward>(m, ops::_bn_squeeze_excite_backward);
    add<bn_activation_backward>(m, ops::_bn_activation_backward);
    add<depthwise_conv_backward>(m, ops::_depthwise_conv_backward);
  }

 private:
  // What the forward op returns, with the output in y.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_into(
      const Tensor& y, const ops::BnSqueezeExcite& a, const ops::Activations& activations) {
    const c10::SymInt channels = a.input.sym_size(1);
    const bool saves_means = activations.pre == Activation::Identity;
    auto [mean, var, inverse] = empty_statistics(a.input, a.batch_statistics);
    Tensor sample_means = empty_matrix(saves_means ? a.input.sym_size(0) : c10::SymInt(0), channels, a.input,
                                       accumulation_type(a.input.scalar_type()));
    Tensor z = saved_matrix(a.input, channels), hidden = saved_matrix(a.input, a.w1.sym_size(0));
    Tensor scale = saved_matrix(a.input, channels);
    const ops::SavedBnSqueezeExcite saved{{mean, inverse}, sample_means, {z, hidden, scale}};
    if constexpr (runs) Run::bn_squeeze_excite(a, activations, y, saved, var);
    return {y, mean, var, inverse, sample_means, z, hidden, scale};
  }

  template <class A, class F>
  static auto backward(const A& a, const F& run) {
    const ops::Activations activations = a.check();
    const Guard guard(a.forward.input);
    const auto gradients = empty_gradients(a.forward, a.mask);
    if constexpr (runs) run(a, activations, gradients);
    return std::tuple_cat(gradients);
  }

  template <auto f, class Op>
  static void add(torch::Library& m, Op) {
    Op::template register_with<f>(m);
  }

  // [N, columns] in the accumulation type
  static Tensor saved_matrix(const Tensor& input, c10::SymInt columns) {
    return empty_matrix(input.sym_size(0), std::move(columns), input, accumulation_type(input.scalar_type()));
  }

  static Statistics empty_statistics(const Tensor& input, bool batch_statistics) {
    const auto options = input.options().dtype(accumulation_type(input.scalar_type()));
    const auto fresh = [&] {
      return at::empty_symint({batch_statistics ? input.sym_size(1) : c10::SymInt(0)}, options);
    };
    return {fresh(), fresh(), fresh()};
  }
};

}  // namespace se_ext
