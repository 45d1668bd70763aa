// Which layout an op's outputs have, and which type. Sizes are symbolic where the input's are.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace se_ext {

// The layouts that the kernels read as they are: contiguous, channels_last, channels_last_3d.
inline bool has_native_layout(const at::Tensor& t) {
  return t.is_contiguous() || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (t.dim() == 5 && t.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

// The map itself, or one copy in the memory format it is nearest to.
inline at::Tensor to_native_layout(const at::Tensor& t) {
  return has_native_layout(t) ? t : t.contiguous(t.suggest_memory_format());
}

// An uninitialised tensor of the map's shape and dtype, in its memory format.
inline at::Tensor empty_map_like(const at::Tensor& t, const at::TensorOptions& options) {
  if (has_native_layout(t)) return at::empty_like(t, options);
  return at::empty_symint(t.sym_sizes(), options, t.suggest_memory_format());
}
inline at::Tensor empty_map_like(const at::Tensor& t) {
  return empty_map_like(t, t.options());
}

// The memory format in which the kernels read the map.
inline at::MemoryFormat native_format(const at::Tensor& t) {
  return t.is_contiguous() ? at::MemoryFormat::Contiguous : t.suggest_memory_format();
}

// The type that a map of this type is summed in, and that its excitation runs in.
inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor empty_matrix(c10::SymInt rows, c10::SymInt columns, const at::Tensor& like, at::ScalarType type) {
  return at::empty_symint({std::move(rows), std::move(columns)}, like.options().dtype(type));
}

// An output that is computed in another type: the output itself where it has that type.
struct InType {
  at::Tensor output, tensor;

  InType(const at::Tensor& to, at::ScalarType type)
      : output(to), tensor(to.scalar_type() == type ? to : at::empty_like(to, to.options().dtype(type))) {}
  void write_back() const {
    if (!tensor.is_same(output)) output.copy_(tensor);
  }
};

}  // namespace se_ext
