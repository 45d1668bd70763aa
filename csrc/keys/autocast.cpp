#include "autocast.h"

namespace se_ext {
namespace {

template <class Op>
typename Op::Result autocast(const typename Op::Arguments& a) {
  return Autocast(a.input).cast(a, Op());
}

// The in-place ops are left out: they write into input, whose dtype has to stay.
void register_all(torch::Library& m) {
  ops::for_each(ops::functional, [&]<class Op>(Op) { Op::template register_with<autocast<Op>>(m); });
}

TORCH_LIBRARY_IMPL(se_ext, AutocastCPU, m) {
  register_all(m);
}
TORCH_LIBRARY_IMPL(se_ext, AutocastCUDA, m) {
  register_all(m);
}

}  // namespace
}  // namespace se_ext
