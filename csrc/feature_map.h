// A feature map as the kernels see it: samples of one slab each.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/allocate.h"
#include "params.h"

namespace se_ext {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::Float32;
    case at::kDouble:
      return DType::Float64;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    default:
      TORCH_INTERNAL_ASSERT(false, "checks let dtype ", t.scalar_type(), " through");
  }
}

// Element i of a buffer whose type only the kernels know.
struct Pointer {
  char* base = nullptr;
  std::int64_t item_bytes = 0;

  Pointer() = default;
  explicit Pointer(const at::Tensor& t) : base(static_cast<char*>(t.data_ptr())), item_bytes(t.element_size()) {}
  char* at(std::int64_t i) const { return base ? base + i * item_bytes : nullptr; }
};

inline Pointer pointer(const at::Tensor& t) {  // null where undefined
  return t.defined() ? Pointer(t) : Pointer();
}

struct FeatureMap {
  at::Tensor tensor;  // in a native layout
  std::int64_t samples;
  Slab slab;
  DType dtype;
  Pointer data;

  explicit FeatureMap(const at::Tensor& t)
      : tensor(to_native_layout(t)), samples(t.size(0)), slab{t.size(1), 1, Layout::ChannelsFirst}, dtype(dtype_of(t)) {
    for (std::int64_t d = 2; d < t.dim(); ++d) slab.points *= t.size(d);
    if (!tensor.is_contiguous()) slab.layout = Layout::ChannelsLast;
    data = Pointer(tensor);
  }

  std::int64_t slab_elements() const { return slab.channels * slab.points; }
  std::int64_t slab_bytes() const { return slab_elements() * data.item_bytes; }
  char* sample(std::int64_t n) const { return data.at(n * slab_elements()); }

  // What the map is summed in, and the excitation runs in.
  at::ScalarType accumulation_type() const { return se_ext::accumulation_type(tensor.scalar_type()); }
  at::TensorOptions accumulation_options() const { return tensor.options().dtype(accumulation_type()); }

  // Another map of the same shape, in this map's layout: itself, or one copy; undefined where there is none.
  at::Tensor in_my_layout(const at::Tensor& other) const {
    if (slab.layout == Layout::ChannelsFirst) return other.contiguous();
    return other.contiguous(other.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
  }
  at::Tensor in_my_layout(const std::optional<at::Tensor>& other) const {
    return other.has_value() ? in_my_layout(*other) : at::Tensor();
  }
};

// Where an op writes its output y, which is the input where the op works in place: then x.tensor, which is a copy of
// the input where that is in no native layout.
struct MapOutput {
  const at::Tensor& y;
  const at::Tensor& tensor;

  MapOutput(const FeatureMap& x, const at::Tensor& input, const at::Tensor& to)
      : y(to), tensor(to.is_same(input) ? x.tensor : to), in_place_(to.is_same(input)) {}
  bool is_input() const { return in_place_; }
  void write_back() const {
    if (!tensor.is_same(y)) y.copy_(tensor);
  }

 private:
  bool in_place_;
};

}  // namespace se_ext
