// Where the plain formula takes the kernels' place: devices without kernels of ours, and torch.func.
#include "../formula/formula.h"

#include "../ops/checks.h"
#include "autocast.h"

namespace se_ext {
namespace {

template <class Op>
typename Op::Result plain(const typename Op::Arguments& a) {
  return formula::compute(a);
}

// Under vmap, grad, jvp, … the formula's own operators are transformed, one by one. These kernels come before
// autocast's, so they cast themselves.
template <class Op>
typename Op::Result transformed(const typename Op::Arguments& a) {
  return Autocast(a.input).cast(a, plain<Op>);
}

template <class Op>
void in_place(const typename Op::Arguments& a) {
  checks::in_place(Op::name, a);
  a.input.copy_(output_of(formula::compute(a)));
}

TORCH_LIBRARY_IMPL(se_ext, CompositeExplicitAutograd, m) {
  ops::for_each(ops::functional, [&]<class Op>(Op) { Op::template register_with<plain<Op>>(m); });
  ops::for_each(ops::in_place, [&]<class Op>(Op) { Op::template register_with<in_place<Op>>(m); });
}

TORCH_LIBRARY_IMPL(se_ext, FuncTorchDynamicLayerFrontMode, m) {
  ops::for_each(ops::functional, [&]<class Op>(Op) { Op::template register_with<transformed<Op>>(m); });
  ops::for_each(ops::in_place, [&]<class Op>(Op) { Op::template register_with<in_place<Op>>(m); });
}

}  // namespace
}  // namespace se_ext
