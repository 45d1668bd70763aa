// The in-place ops for compilers and exporters, which trace programs without mutation: the functional op, and a copy
// into the input that functionalisation understands. The traced graph holds the functional op alone; which of them
// Inductor makes in-place ops again, where the input is dead, is told it by se_ext/_inductor.py.
//
// Without these kernels torch makes the ops functional by itself, and its compiler decides where a copy of the input is
// needed. Inductor (2.13, frozen convolutions) takes that copy by the strides that tracing saw, after it has changed
// the layout of the convolution's output: a silently wrong result, whatever the op's schema says.
#include "../ops/checks.h"

namespace se_ext {
namespace {

template <class InPlace, class Functional>
void written(const typename InPlace::Arguments& a) {
  checks::in_place(InPlace::name, a);
  a.input.copy_(output_of(Functional()(a)));
}

template <class InPlace, class Functional>
void add(torch::Library& m, InPlace, Functional) {
  InPlace::template register_with<written<InPlace, Functional>>(m);
}

void register_all(torch::Library& m) {
  add(m, ops::rescale_, ops::rescale);
  add(m, ops::squeeze_excite_, ops::squeeze_excite);
  add(m, ops::_bn_squeeze_excite_, ops::bn_squeeze_excite);
  add(m, ops::_bn_activation_, ops::_bn_activation);
}

TORCH_LIBRARY_IMPL(se_ext, Functionalize, m) {
  register_all(m);
}
// For views that negate (torch._neg_view, the imaginary part of a conjugate), torch (2.13) has a fallback that writes
// into freed memory where an op returns nothing: it takes what is not there for the tensor that the op wrote.
TORCH_LIBRARY_IMPL(se_ext, Negative, m) {
  register_all(m);
}

}  // namespace
}  // namespace se_ext
