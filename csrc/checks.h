// Every check of the ops' inputs, written once: the CPU and CUDA adapters, the fake (Meta) kernels and the plain
// formula all call these before anything is allocated, read or written. Sizes are symbolic where the tensors are.
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

// A running statistic of a batch norm, where there is one: one value per channel, of any floating type.
void running_statistic(const char* op, const char* name, const OptionalTensor& statistic, const at::Tensor& input);

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

// For the in-place ops: nothing may be recorded for autograd or carry a forward-mode tangent, input's elements may not
// share memory, and the other arguments may not lie in it (the residual may be input itself).
void not_differentiated(const char* op, Arguments arguments);
void writable(const char* op, const at::Tensor& input);
void apart(const char* op, const at::Tensor& input, const OptionalTensor& residual, Arguments others);

// For the backward ops, which autograd calls: grad_output and what forward saved.
void same_shape(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like);
void saved(const char* op, const char* name, const at::Tensor& tensor, const c10::SymInt& rows,
           const c10::SymInt& columns, at::ScalarType type);
void saved_vector(const char* op, const char* name, const at::Tensor& tensor, const c10::SymInt& size,
                  at::ScalarType type);

}  // namespace se_ext::checks
