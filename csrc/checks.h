// Every check of the ops' inputs, written once, one function an op: the CPU and CUDA adapters, the fake (Meta) kernels
// and the plain formula all call it before anything is allocated, read or written. Sizes are symbolic where the tensors
// are.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <string_view>

#include "params.h"

namespace se_ext::checks {

using OptionalTensor = std::optional<at::Tensor>;

// The excitation's weights and the activations' names, as the caller gave them.
struct Excitation {
  const at::Tensor& w1;
  const OptionalTensor& b1;
  const at::Tensor& w2;
  const OptionalTensor& b2;
  std::string_view activation;
  std::string_view gate;
};

// What stands before the block: u = pre(weight ⊙ norm(input) + bias).
struct Prologue {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  bool batch_statistics;
  std::string_view pre_activation;
};

void squeeze(const at::Tensor& input);
void excite(const at::Tensor& z, const Excitation& e);
void rescale(const char* op, const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& residual,
             std::string_view post_activation);
void squeeze_excite(const char* op, const at::Tensor& input, const Excitation& e, const OptionalTensor& residual,
                    std::string_view post_activation);

void bn_squeeze_excite(const char* op, const at::Tensor& input, const Prologue& p, const Excitation& e,
                       const OptionalTensor& residual, std::string_view post_activation,
                       const OptionalTensor& drop_scale);

void bn_activation(const char* op, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   bool batch_statistics, std::string_view activation);

// The ops that write into input, for inference: what the ops without the underscore ask, that nothing is recorded for
// autograd or carries a forward-mode tangent, that input's elements do not share memory, and that the other arguments
// do not lie in it (the residual may be input itself).
void rescale_in_place(const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& residual,
                      std::string_view post_activation);
void squeeze_excite_in_place(const at::Tensor& input, const Excitation& e, const OptionalTensor& residual,
                             std::string_view post_activation);

// What forward saved of the excitation: z [N, C], hidden [N, M], scale [N, C], in the accumulation type.
struct SavedExcitation {
  const at::Tensor& z;
  const at::Tensor& hidden;
  const at::Tensor& scale;
};

// What forward saved of a batch norm: mean and inverse [C], the mean of each sample [N, C], in the accumulation type.
struct SavedStatistics {
  const at::Tensor& mean;
  const at::Tensor& inverse;
  const at::Tensor& sample_means;
};

// The backward ops: what forward asks, and of the gradient and what forward saved, its shape, dtype and device.
void excite_backward(const at::Tensor& grad_output, const at::Tensor& z, const Excitation& e, const at::Tensor& hidden,
                     const at::Tensor& scale);
void rescale_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& scale,
                      const OptionalTensor& saved, std::string_view post_activation);
void squeeze_excite_backward(const at::Tensor& grad_output, const at::Tensor& input, const Excitation& e,
                             const SavedExcitation& s, const OptionalTensor& saved, std::string_view post_activation);
void bn_squeeze_excite_backward(const at::Tensor& grad_output, const at::Tensor& input, const Prologue& p,
                                const Excitation& e, const SavedStatistics& statistics, const SavedExcitation& s,
                                const OptionalTensor& saved, std::string_view post_activation,
                                const OptionalTensor& drop_scale);
void bn_activation_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& inverse,
                            bool batch_statistics, std::string_view activation);

// A running statistic of a batch norm, where there is one: one value per channel, of any floating type.
void running_statistic(const char* op, const char* name, const OptionalTensor& statistic, const at::Tensor& input);
// A weight or bias of a batch norm, where there is one, that is folded with the running statistics before the op sees
// it: what the op asks of it otherwise. Autocast may change the types of both: those that they run in.
void folded_vector(const char* op, const char* name, const OptionalTensor& vector, at::ScalarType vector_type,
                   const at::Tensor& input, at::ScalarType map_type);

// A tensor argument by its name; nothing is asked of one that is absent.
struct Argument {
  const char* name;
  const at::Tensor* tensor;

  Argument(const char* name_, const at::Tensor& t) : name(name_), tensor(&t) {}
  Argument(const char* name_, const OptionalTensor& t) : name(name_), tensor(t.has_value() ? &*t : nullptr) {}
};
using Arguments = std::initializer_list<Argument>;

// That the arguments are strided tensors on one device, that of the first. The checks above ask it too; the kernels at
// the Autograd key ask before anything else, because a fake tensor's device is seen there alone.
void placement(const char* op, Arguments arguments);

}  // namespace se_ext::checks
