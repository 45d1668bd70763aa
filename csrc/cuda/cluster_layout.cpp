#include "cluster_layout.h"

namespace se_ext::cuda {
namespace {

constexpr std::int64_t kStageBytes = 16 * 1024;

// The channels, or hidden channels, of the block that has most.
std::int64_t most_of(std::int64_t items, std::int64_t unit, int blocks) {
  return divide_up(items / unit, blocks) * unit;
}

std::int64_t round_up(std::int64_t items, std::int64_t unit) {
  return divide_up(items, unit) * unit;
}

// Values of the accumulation type in which the sums of the map are combined.
std::int64_t sums_of_map(const ClusterTask& t, const Tiling& tiling, const BandLayout& bands) {
  return t.slab.layout == Layout::ChannelsLast ? (kThreads + bands.tiles * bands.width) * tiling.access : 0;
}

// The same of a product with a transposed weight.
std::int64_t sums_of_product(std::int64_t rows, std::int64_t columns) {
  return divide_up(rows, kPieceRows) * round_up(columns, kSide);
}

}  // namespace

ClusterLayout ClusterLayout::of(const ClusterTask& t, Cluster cluster) {
  const auto [channels, points, layout] = t.slab;
  const Tiling tiling = Tiling::of(t.slab, t.dtype);
  const bool in_bands = layout == Layout::ChannelsLast, is_backward = t.op == ClusterOp::Backward;
  const std::int64_t full = full_access(t.dtype);
  ClusterLayout l{};
  // Channels whose values begin at a multiple of 16 bytes, where there are such.
  l.unit = channels % full == 0 ? full : 1;
  // Backward, what a thread has of a row of the second weight.
  l.hidden_unit = is_backward && t.hidden_channels % kSide == 0 ? kSide : 1;
  const std::int64_t most = most_of(channels, l.unit, cluster.blocks);
  l.bands = in_bands ? BandLayout::of_share(tiling, most / tiling.access) : BandLayout{};
  l.lines = in_bands ? tiling.tiles : most;
  l.step = in_bands ? l.bands.tiles : l.unit;

  // Whole turns of the sums' loop, whose copies begin at multiples of 16 bytes from the start of the share.
  const std::int64_t turn = in_bands ? l.bands.tiles : kThreads / tiling.lanes;
  const std::int64_t line_bytes = (in_bands ? tiling.extent * most : points) * size_of(t.dtype);
  l.stage = turn * std::max<std::int64_t>(1, kStageBytes / (turn * line_bytes * t.maps));

  const std::int64_t kept = std::min(cluster.kept, l.lines);
  const std::int64_t kept_values = in_bands ? std::min(kept * tiling.extent, points) * most : kept * points;
  l.map_bytes = round_up(kept_values * size_of(t.dtype) + 15, 16);  // from any offset

  std::int64_t next = t.maps * l.map_bytes;
  const auto take = [&](std::int64_t values) {
    const std::int64_t at = next;
    next += round_up(values * (t.dtype == DType::Float64 ? 8 : 4), 16);
    return at;
  };
  l.channels_at = take(channels);
  l.second_channels_at = take(is_backward ? channels : 0);
  l.hidden_at = take(t.hidden_channels);
  std::int64_t combined = sums_of_map(t, tiling, l.bands);
  if (is_backward) {
    const std::int64_t most_hidden = most_of(t.hidden_channels, l.hidden_unit, cluster.blocks);
    combined = std::max({combined, sums_of_product(channels, most_hidden), sums_of_product(t.hidden_channels, most)});
  }
  l.scratch_at = take(combined);
  l.bytes = next;
  return l;
}

std::int64_t cluster_keeps(const ClusterTask& t, int blocks, std::int64_t shared_bytes) {
  const ClusterLayout none = ClusterLayout::of(t, {blocks, 0});
  const Tiling tiling = Tiling::of(t.slab, t.dtype);
  const std::int64_t values = t.slab.layout == Layout::ChannelsLast
                                  ? tiling.extent * most_of(t.slab.channels, none.unit, blocks)
                                  : t.slab.points;
  const std::int64_t room = (shared_bytes - none.bytes) / t.maps - 16;
  const std::int64_t lines = std::max<std::int64_t>(0, room / (values * size_of(t.dtype)));
  return std::min(lines / none.step * none.step, none.lines);
}

}  // namespace se_ext::cuda
