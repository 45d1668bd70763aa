#include "../ops/adapters.h"

namespace se_ext {
namespace {

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  Adapters<Cpu>::register_all(m);
}

}  // namespace
}  // namespace se_ext
