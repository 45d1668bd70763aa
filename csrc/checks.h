// Every check of the ops' inputs, written once: the CPU and CUDA adapters, the fake (Meta) kernels and the plain
// formula all call these before anything is allocated, read or written. Sizes are symbolic where the tensors are.
#pragma once

#include <ATen/core/Tensor.h>

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

void squeeze(const at::Tensor& input);
void excite(const at::Tensor& z, const Excitation& e);
void rescale(const char* op, const at::Tensor& input, const at::Tensor& scale, const OptionalTensor& residual,
             std::string_view post_activation);
void squeeze_excite(const char* op, const at::Tensor& input, const Excitation& e, const OptionalTensor& residual,
                    std::string_view post_activation);

// For the in-place ops: nothing may be recorded for autograd, and input's elements may not share memory.
void in_place(const char* op, const at::Tensor& input, std::initializer_list<const at::Tensor*> others,
              std::initializer_list<const OptionalTensor*> optional_others);
void no_overlap(const char* op, const at::Tensor& input, const OptionalTensor& residual);

// For the backward ops, which autograd calls: `like` names the shape that grad must have.
void same_shape(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like);

}  // namespace se_ext::checks
