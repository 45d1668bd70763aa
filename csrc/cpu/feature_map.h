// A feature map as the kernels see it: samples of one slab each, a slab cut into tiles.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../allocate.h"
#include "../params.h"

namespace se_ext::cpu {

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

  // Another map of the same shape, in this map's layout: itself, or one copy.
  at::Tensor in_my_layout(const at::Tensor& other) const {
    if (slab.layout == Layout::ChannelsFirst) return other.contiguous();
    return other.contiguous(other.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
  }
};

// A slab's tiles. Their size depends on the slab and its dtype alone, never on threads or batch, so that partial sums
// over tiles are always combined in the same order.
struct Tiling {
  static constexpr std::int64_t kTileBytes = 32 * 1024;
  static constexpr std::int64_t kAligned = 32;    // channels, so that tiles start where a register does if slabs do
  static constexpr std::int64_t kFewPoints = 16;  // a tile's row of partial sums is small beside the tile
  static constexpr std::int64_t kMostTiles = 64;

  std::int64_t extent;  // channels or points per tile
  std::int64_t total;   // channels or points in all
  std::int64_t count;

  explicit Tiling(const FeatureMap& map) {
    const bool channels_first = map.slab.layout == Layout::ChannelsFirst;
    const std::int64_t line = channels_first ? map.slab.points : map.slab.channels;
    total = channels_first ? map.slab.channels : map.slab.points;
    extent = std::max<std::int64_t>(1, kTileBytes / std::max<std::int64_t>(1, line * map.data.item_bytes));
    if (channels_first) {
      if (extent > kAligned) extent -= extent % kAligned;
    } else {
      extent = std::max({extent, kFewPoints, total / kMostTiles});
    }
    count = (total + extent - 1) / extent;
  }

  Tile tile(std::int64_t i) const { return {i * extent, std::min((i + 1) * extent, total)}; }
};

}  // namespace se_ext::cpu
