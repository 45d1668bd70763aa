// Every op of the library: its arguments in the order of its schema (library.cpp), and the handle that calls it through
// the dispatcher.
//
// The letters are those of docs/design.md. An op's checks are the member check() of its arguments (checks.cpp), which
// returns the activations that it parsed; its allocations are in adapters.h, its gradient's in keys/autograd.cpp.
#pragma once

#include <array>
#include <string_view>
#include <tuple>

#include "activation.h"
#include "flat.h"

namespace se_ext::ops {

// The activations of an op, as its checks parsed them; the identity where the op has none of that name.
struct Activations {
  Activation activation = Activation::Identity;
  Activation gate = Activation::Identity;
  Activation pre = Activation::Identity;
  Activation post = Activation::Identity;
};

// ---- parts of several ops ----

// From the squeezed z to the scale: s = gate(w2 activation(w1 z + b1) + b2). What takes it (checks::excitation,
// cpu::Excitation, cuda::Excitation, formula's scale_of) is where an excitation of another kind would stand.
struct Excitation {
  const Tensor& w1;
  const OptionalTensor& b1;
  const Tensor& w2;
  const OptionalTensor& b2;
  std::string_view activation;
  std::string_view gate;

  auto flat() const { return flat_list(w1, b1, w2, b2, activation, gate); }
};

// y = post(v + residual). In a backward op, `residual` is what forward saved in its place: the output where post's
// slope follows from it; nothing without a residual.
struct Tail {
  const OptionalTensor& residual;
  std::string_view post_activation;

  auto flat() const { return flat_list(residual, post_activation); }
};

// A batch norm's vectors, and whether it is training; else x is not normalised, and they are an affine map.
struct BatchNorm {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  bool batch_statistics;
  double eps;
};

// What the forward ops leave for backward, in the accumulation type.
struct SavedExcitation {
  const Tensor& z;       // [N, C]
  const Tensor& hidden;  // [N, M]
  const Tensor& scale;   // [N, C]

  auto flat() const { return flat_list(z, hidden, scale); }
};
struct SavedStatistics {
  const Tensor& mean;     // [C], as inverse = 1 / sqrt(var + eps); of no elements without batch statistics
  const Tensor& inverse;  // [C]

  auto flat() const { return flat_list(mean, inverse); }
};

// The arguments of a backward op: dL/dy, what forward was called with, what it saved, and which gradients are wanted,
// in the order of forward's differentiable tensors.
template <class Forward, class Saved, std::size_t gradients>
struct Backward {
  const Tensor& grad_output;
  Forward forward;
  Saved saved;
  std::array<bool, gradients> mask;

  auto flat() const { return std::tuple_cat(flat_list(grad_output), forward.flat(), saved.flat(), flat_list(mask)); }
  Activations check() const;
};

template <class Forward, std::size_t gradients>
struct Backward<Forward, void, gradients> {
  const Tensor& grad_output;
  Forward forward;
  std::array<bool, gradients> mask;

  auto flat() const { return std::tuple_cat(flat_list(grad_output), forward.flat(), flat_list(mask)); }
  Activations check() const;
};

// ---- the ops ----

struct Squeeze {
  const Tensor& input;

  static constexpr TensorInfo tensors[] = {{"input", Role::Map}};
  static constexpr const char* name = "squeeze";  // in messages
  auto flat() const { return flat_list(input); }
  Activations check(const char* op = name) const;
};

struct Excite {
  const Tensor& input;  // z
  Excitation excitation;

  static constexpr TensorInfo tensors[] = {
      {"z", Role::Map}, {"w1", Role::Weight}, {"b1", Role::Weight}, {"w2", Role::Weight}, {"b2", Role::Weight}};
  static constexpr const char* name = "excite";
  auto flat() const { return std::tuple_cat(flat_list(input), excitation.flat()); }
  Activations check(const char* op = name) const;
};

struct Rescale {
  const Tensor& input;
  const Tensor& scale;
  Tail tail;

  static constexpr TensorInfo tensors[] = {{"input", Role::Map}, {"scale", Role::Weight}, {"residual", Role::Residual}};
  static constexpr const char* name = "rescale";
  auto flat() const { return std::tuple_cat(flat_list(input, scale), tail.flat()); }
  Activations check(const char* op = name) const;
};

struct SqueezeExcite {
  const Tensor& input;
  Excitation excitation;
  Tail tail;

  static constexpr TensorInfo tensors[] = {{"input", Role::Map}, {"w1", Role::Weight}, {"b1", Role::Weight},
                                           {"w2", Role::Weight}, {"b2", Role::Weight}, {"residual", Role::Residual}};
  static constexpr const char* name = "squeeze_excite";
  auto flat() const { return std::tuple_cat(flat_list(input), excitation.flat(), tail.flat()); }
  Activations check(const char* op = name) const;
};

struct BnSqueezeExcite {
  const Tensor& input;
  const OptionalTensor& bn_weight;
  const OptionalTensor& bn_bias;
  const Tensor& w1;
  const OptionalTensor& b1;
  const Tensor& w2;
  const OptionalTensor& b2;
  bool batch_statistics;
  double eps;
  std::string_view pre_activation;
  std::string_view activation;
  std::string_view gate;
  Tail tail;
  const OptionalTensor& drop_scale;

  Excitation excitation() const { return {w1, b1, w2, b2, activation, gate}; }
  BatchNorm norm() const { return {bn_weight, bn_bias, batch_statistics, eps}; }

  static constexpr TensorInfo tensors[] = {
      {"input", Role::Map}, {"bn_weight", Role::Weight},  {"bn_bias", Role::Weight},
      {"w1", Role::Weight}, {"b1", Role::Weight},         {"w2", Role::Weight},
      {"b2", Role::Weight}, {"residual", Role::Residual}, {"drop_scale", Role::Drawn}};
  static constexpr const char* name = "bn_squeeze_excite";
  auto flat() const {
    return std::tuple_cat(
        flat_list(input, bn_weight, bn_bias, w1, b1, w2, b2, batch_statistics, eps, pre_activation, activation, gate),
        tail.flat(), flat_list(drop_scale));
  }
  Activations check(const char* op = name) const;
};

struct BnActivation {
  const Tensor& input;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  bool batch_statistics;
  double eps;
  std::string_view activation;
  const OptionalTensor& residual;
  const OptionalTensor& drop_scale;

  BatchNorm norm() const { return {weight, bias, batch_statistics, eps}; }
  Tail tail() const { return {residual, activation}; }

  static constexpr TensorInfo tensors[] = {{"input", Role::Map},
                                           {"weight", Role::Weight},
                                           {"bias", Role::Weight},
                                           {"residual", Role::Residual},
                                           {"drop_scale", Role::Drawn}};
  static constexpr const char* name = "bn_activation";
  auto flat() const { return flat_list(input, weight, bias, batch_statistics, eps, activation, residual, drop_scale); }
  Activations check(const char* op = name) const;
};

struct DepthwiseConv {
  const Tensor& input;
  const Tensor& weight;
  const OptionalTensor& bias;
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;

  static constexpr TensorInfo tensors[] = {{"input", Role::Map}, {"weight", Role::Weight}, {"bias", Role::Weight}};
  static constexpr const char* name = "depthwise_conv";
  auto flat() const { return flat_list(input, weight, bias, stride, padding, dilation); }
  Activations check(const char* op = name) const;
};

// What excite saves: its scale is in z's dtype, since it is the output.
struct SavedExcite {
  const Tensor& hidden;
  const Tensor& scale;

  auto flat() const { return flat_list(hidden, scale); }
};
struct SavedBnSqueezeExcite {
  SavedStatistics statistics;
  const Tensor& sample_means;  // [N, C], where pre is the identity; else of no rows
  SavedExcitation excitation;

  auto flat() const { return std::tuple_cat(statistics.flat(), flat_list(sample_means), excitation.flat()); }
};

using ExciteBackward = Backward<Excite, SavedExcite, 5>;
using RescaleBackward = Backward<Rescale, void, 3>;
using SqueezeExciteBackward = Backward<SqueezeExcite, SavedExcitation, 6>;
using BnSqueezeExciteBackward = Backward<BnSqueezeExcite, SavedBnSqueezeExcite, 8>;
using BnActivationBackward = Backward<BnActivation, SavedStatistics, 4>;
using DepthwiseConvBackward = Backward<DepthwiseConv, void, 3>;

inline constexpr Op<"squeeze", Squeeze, 1> squeeze;
inline constexpr Op<"excite", Excite, 1> excite;
inline constexpr Op<"rescale", Rescale, 1> rescale;
inline constexpr Op<"squeeze_excite", SqueezeExcite, 1> squeeze_excite;
inline constexpr Op<"bn_squeeze_excite", BnSqueezeExcite, 3> bn_squeeze_excite;
inline constexpr Op<"_bn_activation", BnActivation, 4> _bn_activation;
inline constexpr Op<"depthwise_conv", DepthwiseConv, 1> depthwise_conv;

inline constexpr Op<"rescale_", Rescale, 0> rescale_;
inline constexpr Op<"squeeze_excite_", SqueezeExcite, 0> squeeze_excite_;
inline constexpr Op<"_bn_squeeze_excite_", BnSqueezeExcite, 0> _bn_squeeze_excite_;
inline constexpr Op<"_bn_activation_", BnActivation, 0> _bn_activation_;

inline constexpr Op<"_excite_forward", Excite, 2> _excite_forward;
inline constexpr Op<"_squeeze_excite_forward", SqueezeExcite, 4> _squeeze_excite_forward;
inline constexpr Op<"_bn_squeeze_excite_forward", BnSqueezeExcite, 8> _bn_squeeze_excite_forward;

inline constexpr Op<"_excite_backward", ExciteBackward, 5> _excite_backward;
inline constexpr Op<"_rescale_backward", RescaleBackward, 3> _rescale_backward;
inline constexpr Op<"_squeeze_excite_backward", SqueezeExciteBackward, 6> _squeeze_excite_backward;
inline constexpr Op<"_bn_squeeze_excite_backward", BnSqueezeExciteBackward, 8> _bn_squeeze_excite_backward;
inline constexpr Op<"_bn_activation_backward", BnActivationBackward, 4> _bn_activation_backward;
inline constexpr Op<"_depthwise_conv_backward", DepthwiseConvBackward, 3> _depthwise_conv_backward;

// How an op is recorded for autograd: what runs forward, what runs backward, and which of forward's results backward
// gets, in the order of its arguments. Forward's first results are those of the op. Each has a type of its own, whose
// name is short: autograd writes it out at every call of a node.
template <class O, class F, class B, std::size_t... saved>
struct Recording {
  using Op = O;
  using Forward = F;
  using Backward = B;
  using Saved = std::index_sequence<saved...>;
};
struct ExciteRecording : Recording<decltype(excite), decltype(_excite_forward), decltype(_excite_backward), 1, 0> {};
struct RescaleRecording : Recording<decltype(rescale), decltype(rescale), decltype(_rescale_backward)> {};
struct SqueezeExciteRecording : Recording<decltype(squeeze_excite), decltype(_squeeze_excite_forward),
                                          decltype(_squeeze_excite_backward), 1, 2, 3> {};
struct BnSqueezeExciteRecording : Recording<decltype(bn_squeeze_excite), decltype(_bn_squeeze_excite_forward),
                                            decltype(_bn_squeeze_excite_backward), 1, 3, 4, 5, 6, 7> {};
struct BnActivationRecording
    : Recording<decltype(_bn_activation), decltype(_bn_activation), decltype(_bn_activation_backward), 1, 3> {};
struct DepthwiseConvRecording
    : Recording<decltype(depthwise_conv), decltype(depthwise_conv), decltype(_depthwise_conv_backward)> {};

// The lists that keys/ registers from.
inline constexpr std::tuple functional{squeeze,           excite,         rescale,       squeeze_excite,
                                       bn_squeeze_excite, _bn_activation, depthwise_conv};
inline constexpr std::tuple in_place{rescale_, squeeze_excite_, _bn_squeeze_excite_, _bn_activation_};
inline constexpr std::tuple<ExciteRecording, RescaleRecording, SqueezeExciteRecording, BnSqueezeExciteRecording,
                            BnActivationRecording, DepthwiseConvRecording>
    differentiable;

template <class List, class F>
void for_each(const List& list, const F& f) {
  std::apply([&](auto... op) { (f(op), ...); }, list);
}

}  // namespace se_ext::ops
