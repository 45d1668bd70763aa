#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <sstream>
#include <vector>

#include "activation_names.h"
#include "allocate.h"
#include "convolution.h"

namespace se_ext {
namespace checks {
namespace {

using ops::Activations;

const char* name_of(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Float:
      return "float32";
    case c10::ScalarType::Double:
      return "float64";
    case c10::ScalarType::BFloat16:
      return "bfloat16";
    case c10::ScalarType::Half:
      return "float16";
    case c10::ScalarType::Byte:
      return "uint8";
    case c10::ScalarType::Char:
      return "int8";
    case c10::ScalarType::Short:
      return "int16";
    case c10::ScalarType::Int:
      return "int32";
    case c10::ScalarType::Long:
      return "int64";
    case c10::ScalarType::Bool:
      return "bool";
    case c10::ScalarType::ComplexFloat:
      return "complex64";
    case c10::ScalarType::ComplexDouble:
      return "complex128";
    default:
      return c10::toString(type);
  }
}

bool is_half(c10::ScalarType type) {
  return type == c10::ScalarType::BFloat16 || type == c10::ScalarType::Half;
}

void floating(const char* op, const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == c10::ScalarType::Float || type == c10::ScalarType::Double || is_half(type), op,
                   ": expected ", name, " of dtype float32, float64, bfloat16 or float16, got ", name_of(type));
}

void strided(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), op, ": expected ", name, " to be a tensor, got None");
  TORCH_CHECK(t.layout() == c10::kStrided, op, ": expected ", name, " to be a strided tensor, got layout ", t.layout());
}

void map(const char* op, const Tensor& input) {
  strided(op, "input", input);
  TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5, op,
              ": expected input of shape [N, C, *spatial] with 1 to 3 spatial dims, got ", input.sym_sizes());
  floating(op, "input", input);
}

void device(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  strided(op, name, t);
  TORCH_CHECK(t.device() == input.device(), op, ": expected ", name, " on device ", input.device(), ", got ",
              t.device());
}

void dtype(const char* op, const char* name, const Tensor& t, c10::ScalarType expected) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, op, ": expected ", name, " of dtype ", name_of(expected), ", got ",
                   name_of(t.scalar_type()));
}

// The map's dtype, or float32 with a half-typed map (mixed precision keeps its master weights).
void dtype_or_float32(const char* op, const char* name, c10::ScalarType type, c10::ScalarType map) {
  const bool may_be_float32 = is_half(map);
  TORCH_CHECK_TYPE(type == map || (may_be_float32 && type == c10::ScalarType::Float), op, ": expected ", name,
                   " of dtype ", name_of(map), may_be_float32 ? " or float32" : "", ", got ", name_of(type));
}
void dtype_or_float32(const char* op, const char* name, const Tensor& t, c10::ScalarType map) {
  dtype_or_float32(op, name, t.scalar_type(), map);
}

// [rows, columns] or [rows, columns, 1, 1]; rows < 0 leaves them free, and the message calls them M.
void weight(const char* op, const char* name, const Tensor& w, const c10::SymInt* rows, const c10::SymInt& columns) {
  const auto fits = [&] {
    if (w.dim() != 2 && w.dim() != 4) return false;
    if (w.dim() == 4 && (w.sym_size(2) != 1 || w.sym_size(3) != 1)) return false;
    return w.sym_size(1) == columns && (rows == nullptr || w.sym_size(0) == *rows);
  };
  if (fits()) return;
  std::ostringstream expected;
  if (rows) {
    expected << *rows;
  } else {
    expected << "M";
  }
  expected << ", " << columns;
  TORCH_CHECK(false, op, ": expected ", name, " of shape [", expected.str(), "] or [", expected.str(), ", 1, 1], got ",
              w.sym_sizes());
}

void shape(const char* op, const char* name, const Tensor& t, c10::SymIntArrayRef expected) {
  TORCH_CHECK(t.sym_sizes() == expected, op, ": expected ", name, " of shape ", expected, ", got ", t.sym_sizes());
}

void bias(const char* op, const char* name, const OptionalTensor& b, const Tensor& w, const Tensor& input) {
  if (!b.has_value()) return;
  device(op, name, *b, input);
  dtype(op, name, *b, w.scalar_type());
  shape(op, name, *b, {w.sym_size(0)});
}

// Parses its two names.
void excitation(const char* op, const Tensor& input, const ops::Excitation& e, Activations& parsed) {
  device(op, "w1", e.w1, input);
  device(op, "w2", e.w2, input);
  dtype_or_float32(op, "w1", e.w1, input.scalar_type());
  dtype(op, "w2", e.w2, e.w1.scalar_type());
  const c10::SymInt channels = input.sym_size(1);
  weight(op, "w1", e.w1, nullptr, channels);
  weight(op, "w2", e.w2, &channels, e.w1.sym_size(0));
  bias(op, "b1", e.b1, e.w1, input);
  bias(op, "b2", e.b2, e.w2, input);
  parsed.activation = parse_activation(op, "activation", e.activation);
  parsed.gate = parse_gate(op, e.gate);
}

// `name` is that of the activation.
void tail(const char* op, const Tensor& input, const ops::Tail& tail, Activations& parsed,
          const char* name = "post_activation") {
  if (tail.residual.has_value()) {
    device(op, "residual", *tail.residual, input);
    dtype(op, "residual", *tail.residual, input.scalar_type());
    shape(op, "residual", *tail.residual, input.sym_sizes());
  }
  parsed.post = parse_activation(op, name, tail.post_activation);
}

// Of each channel, for a batch norm that is training.
void more_than_one_value(const char* op, const Tensor& input) {
  c10::SymInt values = input.sym_size(0);
  for (int64_t d = 2; d < input.dim(); ++d) values *= input.sym_size(d);
  TORCH_CHECK_VALUE(values != 1, op, ": expected more than one value per channel when training, got input of shape ",
                    input.sym_sizes());
}

// One value per channel, or per sample.
void vector(const char* op, const char* name, const OptionalTensor& t, const Tensor& input, const c10::SymInt& size) {
  if (!t.has_value()) return;
  device(op, name, *t, input);
  dtype_or_float32(op, name, *t, input.scalar_type());
  shape(op, name, *t, {size});
}

// Of a stride, a padding, a dilation or a filter's width: products and sums of these stay within 64 bits.
constexpr std::int64_t kMostSteps = std::numeric_limits<std::int32_t>::max();

// One value for all spatial dims, or one a dim; where `may_have_pairs`, also two a dim, or none.
void per_dim(const char* op, const char* name, at::IntArrayRef list, std::size_t dims, std::int64_t least,
             bool may_have_pairs) {
  const bool fits =
      list.size() == 1 || list.size() == dims || (may_have_pairs && (list.size() == 2 * dims || list.empty()));
  TORCH_CHECK(fits, op, ": expected ", name, " of 1 value or ", dims, " (one for each spatial dim",
              may_have_pairs ? "; or two, begin and end; none: \"same\"" : "", "), got ", list);
  for (const std::int64_t value : list) {
    TORCH_CHECK(value >= least, op, ": expected ", name, " of at least ", least, ", got ", list);
    TORCH_CHECK(value <= kMostSteps, op, ": expected ", name, " of at most ", kMostSteps, ", got ", list);
  }
}

// A filter for each channel, and where it is put.
void convolution(const char* op, const ops::DepthwiseConv& a) {
  const c10::SymInt channels = a.input.sym_size(1);
  const bool is_filter =
      a.weight.dim() == a.input.dim() && a.weight.sym_size(0) == channels && a.weight.sym_size(1) == 1;
  TORCH_CHECK(is_filter, op, ": expected weight of shape [", channels, ", 1, *kernel] with ", a.input.dim() - 2,
              " dims of kernel (input is ", a.input.sym_sizes(), "), got ", a.weight.sym_sizes());
  const auto dims = static_cast<std::size_t>(a.input.dim() - 2);
  per_dim(op, "stride", a.stride, dims, 1, false);
  per_dim(op, "padding", a.padding, dims, 0, true);
  per_dim(op, "dilation", a.dilation, dims, 1, false);
  for (std::int64_t d = 2; d < a.input.dim(); ++d) {
    TORCH_CHECK(a.weight.sym_size(d) > 0, op, ": expected weight whose kernel has no dim of size 0, got ",
                a.weight.sym_sizes());
    TORCH_CHECK(a.weight.sym_size(d) <= kMostSteps, op, ": expected weight whose kernel has no dim of more than ",
                kMostSteps, ", got ", a.weight.sym_sizes());
    // As torch's convolution. Of padding "same" it also tells a compiler what it would have to prove.
    TORCH_CHECK(a.input.sym_size(d) > 0, op, ": expected input of at least one point along each spatial dim, got ",
                a.input.sym_sizes());
  }
  for (const ConvolvedDim& d : convolved_dims(a)) {
    if (a.padding.empty()) continue;  // fits as it is made to
    TORCH_CHECK(d.in + d.begin + d.end >= d.reach(), op,
                ": expected input that is, with its padding, at least as large "
                "as the filter, ",
                d.reach(), ", got a dim of ", d.in, " + ", d.begin + d.end);
  }
}

// dL/dy, or another map in y's place.
void map_like(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  device(op, name, t, input);
  dtype(op, name, t, input.scalar_type());
  shape(op, name, t, input.sym_sizes());
}

void saved(const char* op, const char* name, const Tensor& t, const Tensor& input, c10::SymIntArrayRef expected,
           c10::ScalarType type) {
  device(op, name, t, input);
  dtype(op, name, t, type);
  shape(op, name, t, expected);
}

void saved_excitation(const char* op, const Tensor& input, const Tensor& w1, const ops::SavedExcitation& s) {
  const auto type = accumulation_type(input.scalar_type());
  const c10::SymInt samples = input.sym_size(0), channels = input.sym_size(1);
  saved(op, "z", s.z, input, {samples, channels}, type);
  saved(op, "hidden", s.hidden, input, {samples, w1.sym_size(0)}, type);
  saved(op, "scale", s.scale, input, {samples, channels}, type);
}

void saved_statistics(const char* op, const Tensor& input, const ops::SavedStatistics& s) {
  const auto type = accumulation_type(input.scalar_type());
  saved(op, "mean", s.mean, input, {input.sym_size(1)}, type);
  saved(op, "inverse", s.inverse, input, {input.sym_size(1)}, type);
}

// Traced tensors of symbolic sizes, and those that torch.func wraps, have no addresses to compare. What a trace runs in
// the end asks again.
at::MemOverlapStatus overlap(const Tensor& a, const Tensor& b) {
  const auto has_address = [](const Tensor& t) {
    return t.has_storage() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (!has_address(a) || !has_address(b)) return at::MemOverlapStatus::TooHard;
  return at::get_overlap_status(a, b);
}

// Whether two elements of t are surely one. Beside what at::has_internal_overlap finds, strides of 0, two dims whose
// steps meet, as those of overlapping windows: i steps along one end where j along the other do.
bool has_shared_elements(const Tensor& t) {
  const at::MemOverlap found = at::has_internal_overlap(t);
  if (found != at::MemOverlap::TooHard || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return found == at::MemOverlap::Yes;
  }
  if (t.numel() == 0) return false;
  for (std::int64_t a = 0; a < t.dim(); ++a) {
    for (std::int64_t b = 0; b < a; ++b) {
      if (t.size(a) < 2 || t.size(b) < 2) continue;
      const std::int64_t step = std::gcd(t.stride(a), t.stride(b));
      if (t.stride(b) / step < t.size(a) && t.stride(a) / step < t.size(b)) return true;
    }
  }
  return false;
}

}  // namespace

void not_differentiated(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(!(c10::GradMode::is_enabled() && t.requires_grad()), op,
              ": expected no argument that requires grad while grad mode is on (the op writes into input), got ", name,
              "; use the op without the underscore, or torch.no_grad()");
  TORCH_CHECK(!t._fw_grad(/*level=*/0).defined(), op,
              ": expected no argument with a forward-mode tangent (the op writes into input), got ", name,
              "; use the op without the underscore");
}

void writable(const char* op, const Tensor& input) {
  TORCH_CHECK(!has_shared_elements(input), op,
              ": expected input whose elements do not share memory (the op writes into it), got shape ",
              input.sym_sizes(), " with strides ", input.sym_strides());
}

void outside(const char* op, const char* name, const Tensor& t, const Tensor& input, bool may_be_input) {
  const auto status = overlap(input, t);
  if (may_be_input) {
    TORCH_CHECK(status != at::MemOverlapStatus::Partial, op, ": expected ", name,
                " to be apart from input or the same tensor (the op writes into input), got one that overlaps it in "
                "part");
  } else {
    TORCH_CHECK(status != at::MemOverlapStatus::Partial && status != at::MemOverlapStatus::Full, op, ": expected ",
                name, " to be apart from input (the op writes into it), got one that overlaps it");
  }
}

void strided_on(const char* op, const char* name, const Tensor& t, const Tensor* first) {
  if (first) {
    device(op, name, t, *first);
  } else {
    strided(op, name, t);
  }
}

void running_statistic(const char* op, const char* name, const OptionalTensor& statistic, const Tensor& input) {
  if (!statistic.has_value() || input.dim() < 2) return;  // what is wrong with input is said elsewhere
  device(op, name, *statistic, input);
  floating(op, name, *statistic);
  shape(op, name, *statistic, {input.sym_size(1)});
}

void folded_vector(const char* op, const char* name, const OptionalTensor& vector, c10::ScalarType vector_type,
                   const Tensor& input, c10::ScalarType map_type) {
  map(op, input);
  if (!vector.has_value()) return;
  device(op, name, *vector, input);
  dtype_or_float32(op, name, vector_type, map_type);
  shape(op, name, *vector, {input.sym_size(1)});
}

}  // namespace checks

// ---- the ops ----

namespace ops {

Activations Squeeze::check(const char* op) const {
  checks::map(op, input);
  return {};
}

Activations Excite::check(const char* op) const {
  checks::strided(op, "z", input);
  TORCH_CHECK(input.dim() == 2, op, ": expected z of shape [N, C], got ", input.sym_sizes());
  checks::floating(op, "z", input);
  Activations parsed;
  checks::excitation(op, input, excitation, parsed);
  return parsed;
}

Activations Rescale::check(const char* op) const {
  checks::map(op, input);
  checks::device(op, "scale", scale, input);
  checks::dtype_or_float32(op, "scale", scale, input.scalar_type());
  checks::shape(op, "scale", scale, {input.sym_size(0), input.sym_size(1)});
  Activations parsed;
  checks::tail(op, input, tail, parsed);
  return parsed;
}

Activations SqueezeExcite::check(const char* op) const {
  checks::map(op, input);
  Activations parsed;
  checks::excitation(op, input, excitation, parsed);
  checks::tail(op, input, tail, parsed);
  return parsed;
}

Activations BnSqueezeExcite::check(const char* op) const {
  checks::map(op, input);
  checks::vector(op, "bn_weight", bn_weight, input, input.sym_size(1));
  checks::vector(op, "bn_bias", bn_bias, input, input.sym_size(1));
  Activations parsed;
  checks::excitation(op, input, excitation(), parsed);
  checks::tail(op, input, tail, parsed);
  checks::vector(op, "drop_scale", drop_scale, input, input.sym_size(0));
  parsed.pre = parse_activation(op, "pre_activation", pre_activation);
  if (batch_statistics) checks::more_than_one_value(op, input);
  return parsed;
}

// Its activation is the last one: post.
Activations BnActivation::check(const char* op) const {
  checks::map(op, input);
  checks::vector(op, "weight", weight, input, input.sym_size(1));
  checks::vector(op, "bias", bias, input, input.sym_size(1));
  Activations parsed;
  checks::tail(op, input, tail(), parsed, "activation");
  checks::vector(op, "drop_scale", drop_scale, input, input.sym_size(0));
  if (batch_statistics) checks::more_than_one_value(op, input);
  return parsed;
}

Activations DepthwiseConv::check(const char* op) const {
  checks::map(op, input);
  checks::device(op, "weight", weight, input);
  checks::dtype_or_float32(op, "weight", weight, input.scalar_type());
  checks::convolution(op, *this);
  checks::bias(op, "bias", bias, weight, input);
  return {};
}

// ---- backward: what forward asks; of the gradient and what forward saved, its shape, dtype and device ----

template <>
Activations ExciteBackward::check() const {
  const char* op = Excite::name;
  const Activations parsed = forward.check();
  const Tensor& z = forward.input;
  checks::map_like(op, "grad_output", grad_output, z);
  checks::saved(op, "hidden", saved.hidden, z, {z.sym_size(0), forward.excitation.w1.sym_size(0)},
                accumulation_type(z.scalar_type()));
  checks::map_like(op, "scale", saved.scale, z);
  return parsed;
}

template <>
Activations RescaleBackward::check() const {
  const Activations parsed = forward.check();
  checks::map_like(Rescale::name, "grad_output", grad_output, forward.input);
  return parsed;
}

template <>
Activations SqueezeExciteBackward::check() const {
  const Activations parsed = forward.check();
  checks::map_like(SqueezeExcite::name, "grad_output", grad_output, forward.input);
  checks::saved_excitation(SqueezeExcite::name, forward.input, forward.excitation.w1, saved);
  return parsed;
}

template <>
Activations BnSqueezeExciteBackward::check() const {
  const char* op = BnSqueezeExcite::name;
  const Tensor& input = forward.input;
  const Activations parsed = forward.check();
  checks::map_like(op, "grad_output", grad_output, input);
  checks::saved_excitation(op, input, forward.w1, saved.excitation);
  if (parsed.pre == Activation::Identity) {
    checks::saved(op, "sample_means", saved.sample_means, input, {input.sym_size(0), input.sym_size(1)},
                  accumulation_type(input.scalar_type()));
  }
  if (forward.batch_statistics) checks::saved_statistics(op, input, saved.statistics);
  return parsed;
}

template <>
Activations BnActivationBackward::check() const {
  const Activations parsed = forward.check();
  checks::map_like(BnActivation::name, "grad_output", grad_output, forward.input);
  if (forward.batch_statistics) checks::saved_statistics(BnActivation::name, forward.input, saved);
  return parsed;
}

template <>
Activations DepthwiseConvBackward::check() const {
  const char* op = DepthwiseConv::name;
  const Activations parsed = forward.check();
  checks::device(op, "grad_output", grad_output, forward.input);
  checks::dtype(op, "grad_output", grad_output, forward.input.scalar_type());
  checks::shape(op, "grad_output", grad_output, convolved_sizes(forward));
  return parsed;
}

}  // namespace ops
}  // namespace se_ext
