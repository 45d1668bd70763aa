#include "autocast.h"

#include <torch/library.h>

#include "ops.h"

namespace se_ext {
namespace {

using at::Tensor;
using checks::OptionalTensor;

Tensor squeeze(const Tensor& input) {
  const Autocast cast(input);
  return ops::squeeze().call(cast.map(input));
}

Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  const Autocast cast(z);
  return ops::excite().call(cast.map(z), cast.weight(w1), cast.weight(b1), cast.weight(w2), cast.weight(b2), activation,
                            gate);
}

Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  const Autocast cast(input);
  return ops::rescale().call(cast.map(input), cast.weight(scale), cast.map(residual), post_activation);
}

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  const Autocast cast(input);
  return ops::squeeze_excite().call(cast.map(input), cast.weight(w1), cast.weight(b1), cast.weight(w2), cast.weight(b2),
                                    activation, gate, cast.map(residual), post_activation);
}

std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  const Autocast cast(input);
  return ops::bn_squeeze_excite().call(cast.map(input), cast.weight(weight), cast.weight(bias), cast.weight(w1),
                                       cast.weight(b1), cast.weight(w2), cast.weight(b2), batch_statistics, eps,
                                       pre_activation, activation, gate, cast.map(residual), post_activation,
                                       cast.weight(drop_scale));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double eps,
                                                         std::string_view activation) {
  const Autocast cast(input);
  return ops::_bn_activation().call(cast.map(input), cast.weight(weight), cast.weight(bias), batch_statistics, eps,
                                    activation);
}

// The in-place ops are left out: they write into input, whose dtype has to stay.
void register_all(torch::Library& m) {
  m.impl("squeeze", squeeze);
  m.impl("excite", excite);
  m.impl("rescale", rescale);
  m.impl("squeeze_excite", squeeze_excite);
  m.impl("bn_squeeze_excite", bn_squeeze_excite);
  m.impl("_bn_activation", bn_activation);
}

TORCH_LIBRARY_IMPL(se_ext, AutocastCPU, m) {
  register_all(m);
}
TORCH_LIBRARY_IMPL(se_ext, AutocastCUDA, m) {
  register_all(m);
}

}  // namespace
}  // namespace se_ext
