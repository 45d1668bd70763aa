// A sample in one kernel: the blocks of a cluster keep the maps that both passes read in their shared memory, from the
// pass that sums to the pass that writes. Before sm_90 a cluster is one block. Of maps that are larger than their
// memory they keep a part, and read the rest again, which the L2 cache may still have.
//
// In both layouts each block has some of the channels; it sums and writes them alone. Between the passes stands an
// excitation (cluster_excitation.cuh). Sums are taken by the functions that the other paths use, in the same order.
#pragma once

#include "../clusters.h"
#include "cluster_excitation.cuh"
#include "map.cuh"

namespace se_ext::cuda {

// What the kernel needs besides the visitors and the excitation. The lines of a share are its channels, in
// channels_last its tiles.
template <class A>
struct MemberWork {
  Tiling tiling;
  std::int64_t channels, hidden_channels, points, first_sample;
  std::int64_t kept;  // lines of a share, from the first on, that stay in shared memory
  ClusterLayout layout;
  Divider by_points;
  A divisor;  // of the sums
};

// Loads the stages of a share and uses each as soon as it is there, while the next kStagesAhead are on their way.
constexpr int kStagesAhead = 3;

template <class Load, class Use>
SE_EXT_DEVICE void in_stages(std::int64_t stages, const Load& load, const Use& use) {
  for (std::int64_t next = 0; next < stages + kStagesAhead; ++next) {
    if (next < stages) load(next);
    copies_commit();
    if (next < kStagesAhead) continue;
    copies_wait<kStagesAhead>();
    __syncthreads();
    use(next - kStagesAhead);
  }
}

SE_EXT_DEVICE std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

// Copies [from, from + count) to shared memory, where it lies at the same offset from a multiple of 16 bytes.
template <class T>
SE_EXT_DEVICE void fetch(const T* from, std::int64_t count, T* to) {
  const auto offset = static_cast<int>(reinterpret_cast<std::uintptr_t>(from) & 15);
  const std::int64_t to_aligned = (offset ? 16 - offset : 0) / static_cast<int>(sizeof(T));
  const std::int64_t head = to_aligned < count ? to_aligned : count;
  const std::int64_t accesses = (count - head) / kFull<T>;
  for (std::int64_t i = threadIdx.x; i < accesses; i += kThreads) {
    copy16(to + head + i * kFull<T>, from + head + i * kFull<T>);
  }
  for (std::int64_t i = threadIdx.x; i < head; i += kThreads) to[i] = from[i];
  for (std::int64_t i = head + accesses * kFull<T> + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

// The same for `points` rows of `width` values that lie `pitch` apart, to one after the other.
template <int n, class T>
SE_EXT_DEVICE void fetch_rows(const T* from, std::int64_t points, std::int64_t width, std::int64_t pitch, T* to) {
  const std::int64_t per_row = width / n;  // the rows start at multiples of n values
  const std::int64_t rows_ahead = kThreads / per_row, columns_ahead = kThreads - rows_ahead * per_row;
  std::int64_t row = threadIdx.x / per_row, column = threadIdx.x - row * per_row;
  while (row < points) {
    if constexpr (n == 1) {
      to[row * width + column] = from[row * pitch + column];
    } else {
      copy16(to + row * width + column * n, from + row * pitch + column * n);
    }
    row += rows_ahead;
    column += columns_ahead;
    if (column >= per_row) {
      column -= per_row;
      ++row;
    }
  }
}

// A visitor that sums what is not kept. It reads far memory directly, by one thread block of a multiprocessor: of one
// map with more accesses ahead.
template <class Visitor>
struct FurtherAhead : Visitor {
  static constexpr int kAhead = Visitor::kMaps > 1 || sizeof(typename Visitor::value_type) > 4 ? Visitor::kAhead
                                                                                               : 2 * Visitor::kAhead;
};

enum class Writing { Rows, AcrossRows, Bands };

template <Writing writing, int n, class Sum, class Write, class Excite>
__global__ void __launch_bounds__(kThreads, most_per_multiprocessor(Excite::kOp, sizeof(typename Sum::value_type)))
    cluster_kernel(Sum sum, Write write, Excite excite, MemberWork<acc_t<typename Sum::value_type>> w) {
  using T = typename Sum::value_type;
  using A = acc_t<T>;
  const int rank = cluster_rank(), ranks = cluster_size(), thread = static_cast<int>(threadIdx.x);
  const std::int64_t C = w.channels, P = w.points, tiles = w.tiling.tiles;
  const std::int64_t sample = w.first_sample + blockIdx.x / static_cast<unsigned>(ranks);
  const Member block{
      sample, rank, ranks, {C, w.layout.unit, rank, ranks}, {w.hidden_channels, w.layout.hidden_unit, rank, ranks}};
  const Share mine = block.channels;
  const std::int64_t width = mine.end - mine.begin;

  char* const shared = dynamic_shared();
  const auto vector = [=](std::int64_t at) { return reinterpret_cast<A*>(shared + at); };
  const MemberVectors<A> vectors{vector(w.layout.channels_at), vector(w.layout.second_channels_at),
                                 vector(w.layout.hidden_at), vector(w.layout.scratch_at)};
  cluster_arrive();
  excite.bind(sum, write, vectors);
  excite.begin(block, vectors);

  // Here and in shared memory the maps begin with this block's share; the kept part of each lies as far from a multiple
  // of 16 bytes as the share does.
  const std::int64_t begin = writing == Writing::Bands ? sample * C * P + mine.begin : (sample * C + mine.begin) * P;
  const auto to_share = [=](const T*& map, int) { map += begin; };
  const auto part = [=, first = shared + begin * sizeof(T) % 16, bytes = w.layout.map_bytes](int map) {
    return reinterpret_cast<T*>(first + map * bytes);
  };
  sum.each_map(to_share);
  write.each_map(to_share);
  Sum sum_kept = sum;
  Write write_kept = write;
  const auto to_part = [=](const T*& map, int i) { map = part(i); };
  sum_kept.each_map(to_part);
  write_kept.each_map(to_part);
  const FurtherAhead<Sum> sum_rest{sum};
  const std::int64_t lines = writing == Writing::Bands ? tiles : width, kept = smaller(w.kept, lines);
  const std::int64_t stages = (kept + w.layout.stage - 1) / w.layout.stage;
  const auto of_slab = [=](std::int64_t point, std::int64_t channel) { return point * C + channel - mine.begin; };
  const auto of_kept = [=](std::int64_t point, std::int64_t channel) { return point * width + channel - mine.begin; };

  if constexpr (writing == Writing::Bands) {
    const BandLayout& bands = w.layout.bands;
    A* const tile_sums = vectors.scratch + kThreads * n;
    const int wide = bands.width * n;
    const auto sum_lines = [&](const auto& visitor, std::int64_t begin, std::int64_t end, const auto& index) {
      for (std::int64_t t = begin; t < end; t += bands.tiles) {
        for (std::int64_t first = mine.begin; first < mine.end; first += wide) {
          sum_band<n>(visitor, sample, first, mine.end, t, w.tiling, bands, P, vectors.scratch, index,
                      [&](int, int tile, std::int64_t channel, A of_tile) {
                        tile_sums[tile * wide + channel - first] = of_tile;
                      });
          // As sum_tiles: a channel is always the same thread's.
          const std::int64_t c = first + thread, left = tiles - t;
          if (thread < wide && c < mine.end) {
            A all = t == 0 ? tile_sums[thread] : vectors.channels[c] + tile_sums[thread];
            for (int i = 1; i < bands.tiles && i < left; ++i) all += tile_sums[i * wide + thread];
            vectors.channels[c] = left <= bands.tiles ? all / w.divisor : all;
          }
        }
      }
    };
    const auto load = [&](std::int64_t stage) {
      const std::int64_t begin = stage * w.layout.stage, end = smaller(begin + w.layout.stage, kept);
      const std::int64_t point = begin * w.tiling.extent, end_point = smaller(end * w.tiling.extent, P);
      sum.each_map([&](const T* map, int i) {
        fetch_rows<n>(map + point * C, end_point - point, width, C, part(i) + point * width);
      });
    };
    in_stages(stages, load, [&](std::int64_t stage) {
      sum_lines(sum_kept, stage * w.layout.stage, smaller((stage + 1) * w.layout.stage, kept), of_kept);
    });
    sum_lines(sum_rest, kept, lines, of_slab);
  } else {
    const auto sum_lines = [&](const auto& visitor, std::int64_t begin, std::int64_t end) {
      for (std::int64_t start = begin; start < end; start += kThreads / w.tiling.lanes) {
        const std::int64_t mine_of_start = start + thread / w.tiling.lanes;
        const std::int64_t line = mine_of_start < end ? mine_of_start : end - 1, channel = mine.begin + line;
        const A all = sum_tiles<A>(tiles, [&](std::int64_t t) {
          return sum_row<n>(visitor, sample, channel, line, t, w.tiling, P / n).part[0][0];
        });
        if (mine_of_start < end && (thread & (w.tiling.lanes - 1)) == 0) vectors.channels[channel] = all / w.divisor;
      }
    };
    const auto load = [&](std::int64_t stage) {
      const std::int64_t begin = stage * w.layout.stage, end = smaller(begin + w.layout.stage, kept);
      sum.each_map([&](const T* map, int i) { fetch(map + begin * P, (end - begin) * P, part(i) + begin * P); });
    };
    in_stages(stages, load, [&](std::int64_t stage) {
      sum_lines(sum_kept, stage * w.layout.stage, smaller((stage + 1) * w.layout.stage, kept));
    });
    sum_lines(sum_rest, kept, lines);
  }
  __syncthreads();
  excite.run(block, vectors);

  const auto write_lines = [&](const Write& visitor, std::int64_t begin, std::int64_t end, const auto& index) {
    if constexpr (writing == Writing::Rows) {
      const int lanes = w.tiling.lanes;
      for (std::int64_t line = begin + thread / lanes; line < end; line += kThreads / lanes) {
        const std::int64_t c = mine.begin + line;
        for (std::int64_t t = 0; t < tiles; ++t) {
          write_row<n>(visitor, sample, c, sample * C + c, line, t, w.tiling, P / n);
        }
      }
    } else if constexpr (writing == Writing::AcrossRows) {
      constexpr int kAccess = kFull<T>;
      write_across_rows<kAccess>(visitor, sample, -mine.begin * P, (mine.begin + begin) * P / kAccess,
                                 (mine.begin + end) * P / kAccess, thread, kThreads, C, w.by_points);
    } else {
      const std::int64_t point = begin * w.tiling.extent, end_point = smaller(end * w.tiling.extent, P);
      for (std::int64_t first = mine.begin; first < mine.end; first += w.layout.bands.width * n) {
        write_band<n>(visitor, sample, first, mine.end, point, end_point, w.layout.bands, C, P, index);
      }
    }
  };
  write_lines(write, kept, lines, of_slab);  // what was read last is in the cache
  write_lines(write_kept, 0, kept, of_kept);
}

// f(kernel) with the kernel of a slab
template <class Sum, class Write, class Excite, class F>
auto with_cluster_kernel(const Slab& slab, DType type, const F& f) {
  using T = typename Sum::value_type;
  const int access = Tiling::of(slab, type).access;
  if (slab.layout == Layout::ChannelsLast) {
    return access == 1 ? f(cluster_kernel<Writing::Bands, 1, Sum, Write, Excite>)
                       : f(cluster_kernel<Writing::Bands, kFull<T>, Sum, Write, Excite>);
  }
  if (writes_across_rows(slab, type)) return f(cluster_kernel<Writing::AcrossRows, 1, Sum, Write, Excite>);
  return with_access<T>(access, [&]<int n>() { return f(cluster_kernel<Writing::Rows, n, Sum, Write, Excite>); });
}

template <class Sum, class Write, class Excite>
bool can_launch_cluster(const ClusterTask& task, Cluster cluster) {
  const ClusterShape shape{cluster.blocks, kThreads, ClusterLayout::of(task, cluster).bytes};
  return with_cluster_kernel<Sum, Write, Excite>(
      task.slab, task.dtype, [&](auto kernel) { return can_launch(reinterpret_cast<const void*>(kernel), shape); });
}

template <class Sum, class Write, class Excite>
cudaError_t launch_cluster(const Batch& batch, const ClusterTask& task, Cluster cluster, double divisor, const Sum& sum,
                           const Write& write, const Excite& excite) {
  using A = acc_t<typename Sum::value_type>;
  const auto [channels, points, layout] = batch.slab;
  if (batch.samples == 0 || channels == 0 || points == 0) return cudaSuccess;
  const MemberWork<A> work{
      Tiling::of(batch.slab, batch.dtype), channels,        task.hidden_channels,   points, batch.first, cluster.kept,
      ClusterLayout::of(task, cluster),    Divider(points), static_cast<A>(divisor)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(batch.samples * cluster.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(work.layout.bytes);
  config.stream = batch.stream;
  config.attrs = &attribute;
  config.numAttrs = cluster.blocks > 1 ? 1 : 0;
  return with_cluster_kernel<Sum, Write, Excite>(batch.slab, batch.dtype, [&](auto kernel) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
    return error != cudaSuccess ? error : cudaLaunchKernelEx(&config, kernel, sum, write, excite, work);
  });
}

}  // namespace se_ext::cuda
