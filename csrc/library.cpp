// Every op of se_ext, on one screen. Arguments as structs: ops/ops.h · kernels: cpu/, cuda/ · at the other dispatch
// keys: keys/, one file a key · in terms of other ops: batch_norm/.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

TORCH_LIBRARY(se_ext, m) {
  // flexible_layout: the ops take any strides, so a compiler may choose them.
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};

  // The formula: squeeze, excite, rescale, and the three as one.
  m.def("squeeze(Tensor input) -> Tensor", tags);
  m.def(
      "excite(Tensor z, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation=\"relu\", "
      "str gate=\"sigmoid\") -> Tensor",
      tags);
  m.def("rescale(Tensor input, Tensor scale, Tensor? residual=None, str post_activation=\"identity\") -> Tensor", tags);
  m.def(
      "squeeze_excite(Tensor input, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation=\"relu\", "
      "str gate=\"sigmoid\", Tensor? residual=None, str post_activation=\"identity\") -> Tensor",
      tags);

  // The block behind a prologue: u = pre(weight ⊙ norm(input) + bias) takes the place of input. norm is the batch's own
  // normalisation where batch_statistics, else nothing. mean and var (biased) [C] are those of the batch, for the
  // running statistics; without any, of no elements.
  m.def(
      "bn_squeeze_excite(Tensor input, Tensor? bn_weight, Tensor? bn_bias, Tensor w1, Tensor? b1, Tensor w2, "
      "Tensor? b2, bool batch_statistics, float eps=1e-05, str pre_activation=\"identity\", str activation=\"relu\", "
      "str gate=\"sigmoid\", Tensor? residual=None, str post_activation=\"identity\", Tensor? drop_scale=None) "
      "-> (Tensor output, Tensor mean, Tensor var)",
      tags);
  // The same with the running statistics of a batch norm module: read where not training, else updated, as is the count
  // of batches. No momentum: the average of all batches.
  m.def(
      "_bn_squeeze_excite_running(Tensor input, Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
      "bool training, float? momentum, float eps, str pre_activation, str activation, str gate, Tensor? residual, "
      "str post_activation, Tensor? drop_scale) -> Tensor",
      tags);

  // A batch norm and an activation without a block behind them, for the rest of a network:
  // y = activation(drop_scale ⊙ (weight ⊙ norm(input) + bias) + residual). Statistics as above, and
  // inverse = 1 / sqrt(var + eps).
  m.def(
      "_bn_activation(Tensor input, Tensor? weight, Tensor? bias, bool batch_statistics, float eps, str activation, "
      "Tensor? residual=None, Tensor? drop_scale=None) -> (Tensor output, Tensor mean, Tensor var, Tensor inverse)",
      tags);
  m.def(
      "_bn_activation_running(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "str activation, Tensor? residual=None, Tensor? drop_scale=None) -> Tensor",
      tags);

  // The block's neighbour: each channel meets a filter of its own, weight [C, 1, *kernel]. stride and dilation: one
  // value for all spatial dims, or one a dim; padding also two a dim (begin and end), and none for "same"
  // (ops/convolution.h).
  m.def(
      "depthwise_conv(Tensor input, Tensor weight, Tensor? bias=None, int[1] stride=1, int[1] padding=0, "
      "int[1] dilation=1) -> Tensor",
      tags);

  // In place, for inference. They return nothing: a compiler takes what an op returns for memory of its own, and reuses
  // that of an input whose last reader it has seen, while an alias of it is still to be read.
  m.def("rescale_(Tensor(a!) input, Tensor scale, Tensor? residual=None, str post_activation=\"identity\") -> ()",
        tags);
  m.def(
      "squeeze_excite_(Tensor(a!) input, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation=\"relu\", "
      "str gate=\"sigmoid\", Tensor? residual=None, str post_activation=\"identity\") -> ()",
      tags);
  m.def(
      "_bn_squeeze_excite_(Tensor(a!) input, Tensor? bn_weight, Tensor? bn_bias, Tensor w1, Tensor? b1, Tensor w2, "
      "Tensor? b2, bool batch_statistics, float eps, str pre_activation, str activation, str gate, Tensor? residual, "
      "str post_activation, Tensor? drop_scale) -> ()",
      tags);
  m.def(
      "_bn_activation_(Tensor(a!) input, Tensor? weight, Tensor? bias, bool batch_statistics, float eps, "
      "str activation, Tensor? residual=None, Tensor? drop_scale=None) -> ()",
      tags);
  // The same behind a batch norm module in evaluation, by its running statistics.
  m.def(
      "_bn_squeeze_excite_running_(Tensor(a!) input, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, "
      "Tensor running_var, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, float eps, str pre_activation, "
      "str activation, str gate, Tensor? residual, str post_activation, Tensor? drop_scale) -> ()",
      tags);
  m.def(
      "_bn_activation_running_(Tensor(a!) input, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, str activation, Tensor? residual=None, Tensor? drop_scale=None) -> ()",
      tags);

  // For autograd: forward ops that leave what backward needs, and backward ops, whose arguments are the gradient, those
  // of forward, what forward left, and a mask that says which gradients are wanted; the others come back as None. In
  // the place of the residual, `saved` is the output where the last activation's slope follows from it, else the
  // residual; None without a residual.
  m.def(
      "_excite_forward(Tensor z, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate) "
      "-> (Tensor output, Tensor hidden)",
      tags);
  m.def(
      "_excite_backward(Tensor grad_output, Tensor z, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, "
      "str gate, Tensor hidden, Tensor scale, bool[5] mask) "
      "-> (Tensor z, Tensor w1, Tensor b1, Tensor w2, Tensor b2)",
      tags);
  m.def(
      "_rescale_backward(Tensor grad_output, Tensor input, Tensor scale, Tensor? saved, str post_activation, "
      "bool[3] mask) -> (Tensor input, Tensor scale, Tensor residual)",
      tags);
  m.def(
      "_squeeze_excite_forward(Tensor input, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, "
      "str gate, Tensor? residual, str post_activation) "
      "-> (Tensor output, Tensor z, Tensor hidden, Tensor scale)",
      tags);
  m.def(
      "_squeeze_excite_backward(Tensor grad_output, Tensor input, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
      "str activation, str gate, Tensor? saved, str post_activation, Tensor z, Tensor hidden, Tensor scale, "
      "bool[6] mask) -> (Tensor input, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor residual)",
      tags);
  m.def(
      "_bn_squeeze_excite_forward(Tensor input, Tensor? bn_weight, Tensor? bn_bias, Tensor w1, Tensor? b1, Tensor w2, "
      "Tensor? b2, bool batch_statistics, float eps, str pre_activation, str activation, str gate, Tensor? residual, "
      "str post_activation, Tensor? drop_scale) -> (Tensor output, Tensor mean, Tensor var, Tensor inverse, "
      "Tensor sample_means, Tensor z, Tensor hidden, Tensor scale)",
      tags);
  m.def(
      "_bn_squeeze_excite_backward(Tensor grad_output, Tensor input, Tensor? bn_weight, Tensor? bn_bias, Tensor w1, "
      "Tensor? b1, Tensor w2, Tensor? b2, bool batch_statistics, float eps, str pre_activation, str activation, "
      "str gate, Tensor? saved, str post_activation, Tensor? drop_scale, Tensor mean, Tensor inverse, "
      "Tensor sample_means, Tensor z, Tensor hidden, Tensor scale, bool[8] mask) -> (Tensor input, Tensor bn_weight, "
      "Tensor bn_bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor residual)",
      tags);
  m.def(
      "_bn_activation_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, bool batch_statistics, "
      "float eps, str activation, Tensor? saved, Tensor? drop_scale, Tensor mean, Tensor inverse, bool[4] mask) "
      "-> (Tensor input, Tensor weight, Tensor bias, Tensor residual)",
      tags);
  m.def(
      "_depthwise_conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, bool[3] mask) -> (Tensor input, Tensor weight, Tensor bias)",
      tags);
}
