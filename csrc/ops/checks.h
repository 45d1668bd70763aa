// Checks that are not of one op. Those of an op are the member check() of its arguments (ops.h), which CPU, CUDA, Meta
// and the plain formula call before anything is allocated, read or written. Sizes are symbolic where the tensors are.
#pragma once

#include "ops.h"

namespace se_ext::checks {

// Of one argument: see placement() and in_place() below.
void strided_on(const char* op, const char* name, const Tensor& t, const Tensor* first);
void not_differentiated(const char* op, const char* name, const Tensor& t);
void writable(const char* op, const Tensor& input);
void outside(const char* op, const char* name, const Tensor& t, const Tensor& input, bool may_be_input);

// A running statistic of a batch norm, where there is one: one value per channel, of any floating type.
void running_statistic(const char* op, const char* name, const OptionalTensor& statistic, const Tensor& input);
// A weight or bias of a batch norm, where there is one, that is folded with the running statistics before the op sees
// it: what the op asks of it otherwise. Autocast may change the types of both: those that they run in.
void folded_vector(const char* op, const char* name, const OptionalTensor& vector, at::ScalarType vector_type,
                   const Tensor& input, at::ScalarType map_type);

// f(info, tensor) for the tensors that are there.
template <class A, class F>
void for_each_present(const A& arguments, const F& f) {
  for_each_tensor(arguments, [&](const TensorInfo& info, const Tensor* t) {
    if (t) f(info, *t);
  });
}

// That the arguments are strided tensors on one device, that of the input. check() asks it too; the kernels at the
// Autograd key ask before anything else, because a fake tensor's device is seen there alone.
template <class A>
void placement(const char* op, const A& arguments) {
  for_each_present(arguments, [&](const TensorInfo& info, const Tensor& t) { strided_on(op, info.name, t, nullptr); });
  for_each_present(arguments,
                   [&](const TensorInfo& info, const Tensor& t) { strided_on(op, info.name, t, &arguments.input); });
}

// An op that writes into input, for inference: what the op without the underscore asks, that nothing is recorded for
// autograd or carries a forward-mode tangent, that input's elements do not share memory, and that the other arguments
// do not lie in it (the residual may be input itself).
template <class A>
ops::Activations in_place(const char* op, const A& arguments) {
  const ops::Activations parsed = arguments.check(op);
  for_each_present(arguments, [&](const TensorInfo& info, const Tensor& t) { not_differentiated(op, info.name, t); });
  writable(op, arguments.input);
  for_each_present(arguments, [&](const TensorInfo& info, const Tensor& t) {
    if (&t != &arguments.input) outside(op, info.name, t, arguments.input, info.role == Role::Residual);
  });
  return parsed;
}

}  // namespace se_ext::checks
