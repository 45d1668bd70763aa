#include "../ops/adapters.h"

namespace se_ext {
namespace {

TORCH_LIBRARY_IMPL(se_ext, Meta, m) {
  Adapters<Fake>::register_all(m);
}

}  // namespace
}  // namespace se_ext
