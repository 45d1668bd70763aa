// Autocast: the map runs in the autocast dtype, the weights stay as they are (the kernels take float32 weights beside
// a half-typed map). Weights in the other half type, which the kernels refuse, are cast along.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace se_ext {
namespace {

using at::Tensor;
using checks::OptionalTensor;

template <c10::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard off{
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device))};
  at::ScalarType to = at::autocast::get_autocast_dtype(device);

  Tensor map(const Tensor& t) const { return at::autocast::cached_cast(to, t, device); }
  OptionalTensor map(const OptionalTensor& t) const { return t.has_value() ? OptionalTensor(map(*t)) : t; }
  Tensor weight(const Tensor& t) const { return t.scalar_type() == at::kFloat ? t : map(t); }
  OptionalTensor weight(const OptionalTensor& t) const { return t.has_value() ? OptionalTensor(weight(*t)) : t; }
};

template <c10::DeviceType device>
Tensor squeeze(const Tensor& input) {
  const Autocast<device> cast;
  return ops::squeeze().call(cast.map(input));
}

template <c10::DeviceType device>
Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  const Autocast<device> cast;
  return ops::excite().call(cast.map(z), cast.weight(w1), cast.weight(b1), cast.weight(w2), cast.weight(b2), activation,
                            gate);
}

template <c10::DeviceType device>
Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  const Autocast<device> cast;
  return ops::rescale().call(cast.map(input), cast.weight(scale), cast.map(residual), post_activation);
}

template <c10::DeviceType device>
Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  const Autocast<device> cast;
  return ops::squeeze_excite().call(cast.map(input), cast.weight(w1), cast.weight(b1), cast.weight(w2), cast.weight(b2),
                                    activation, gate, cast.map(residual), post_activation);
}

// The in-place ops write into the input, whose dtype must stay: autocast leaves them alone (it has no key for them).
template <c10::DeviceType device>
void register_all(torch::Library& m) {
  m.impl("squeeze", squeeze<device>);
  m.impl("excite", excite<device>);
  m.impl("rescale", rescale<device>);
  m.impl("squeeze_excite", squeeze_excite<device>);
}

TORCH_LIBRARY_IMPL(se_ext, AutocastCPU, m) {
  register_all<c10::DeviceType::CPU>(m);
}
TORCH_LIBRARY_IMPL(se_ext, AutocastCUDA, m) {
  register_all<c10::DeviceType::CUDA>(m);
}

}  // namespace
}  // namespace se_ext
