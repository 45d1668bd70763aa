// Tensors as the CUDA kernels take them: in a native layout, aligned to 16 bytes. One copy makes them so.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../feature_map.h"
#include "device.h"
#include "launch.h"
#include "tiling.h"

namespace se_ext::cuda {

inline at::Tensor aligned(const at::Tensor& t) {
  return reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % kAccessBytes == 0 ? t : t.clone();
}

inline FeatureMap aligned_map(const at::Tensor& t) {
  return FeatureMap(aligned(to_native_layout(t)));
}

// Another map of the same shape in the layout of x; undefined where there is none.
inline at::Tensor aligned_like(const FeatureMap& x, const OptionalTensor& other) {
  const at::Tensor t = x.in_my_layout(other);
  return t.defined() ? aligned(t) : t;
}

inline at::Tensor vector_in(const OptionalTensor& t, at::ScalarType type) {
  return t.has_value() ? aligned(t->to(type).contiguous()) : at::Tensor();
}

inline const void* data(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

inline void* writable(const at::Tensor& t) {
  return t.defined() ? t.data_ptr() : nullptr;
}

inline Batch batch_of(const FeatureMap& x, bool streaming = false) {
  return {x.dtype,
          x.slab,
          0,
          x.samples,
          streaming,
          c10::cuda::getCurrentCUDAStream().stream(),
          current_device().multiprocessors};
}

// Whether `maps` tensors of this size are more than the L2 cache keeps.
inline bool is_streaming(const FeatureMap& x, int maps) {
  return x.samples * x.slab_bytes() * maps > current_device().l2_bytes;
}

// f(part) for one range of `chunk` samples of the batch after the other.
template <class F>
void for_each_chunk(const Batch& batch, std::int64_t chunk, const F& f) {
  Batch part = batch;
  const std::int64_t end = batch.first + batch.samples;
  for (; part.first < end; part.first += chunk) {
    part.samples = std::min(chunk, end - part.first);
    f(part);
  }
}

// One allocation for a call's small vectors, which the caching allocator hands on in the stream's order.
class Scratch {
 public:
  Scratch(std::int64_t items, int pieces, const at::TensorOptions& options)
      : memory_(at::empty({items + pieces * kPiece}, options)), next_(memory_) {}

  // The next `items` values, aligned, uninitialised.
  void* take(std::int64_t items) {
    void* taken = next_.base;
    next_.base = next_.at((items + kPiece - 1) / kPiece * kPiece);
    return taken;
  }

 private:
  static constexpr std::int64_t kPiece = 16;  // values: 64 bytes and more
  at::Tensor memory_;
  Pointer next_;
};

}  // namespace se_ext::cuda
