// The whole block of a sample in one kernel: the blocks of a cluster keep the sample's slab in their shared memory from
// the squeeze to the rescale, so that x is read once. Before sm_90 a cluster is one block. Of a slab that is larger
// than their memory they keep a part, and read the rest again, which the L2 cache may still have.
//
// In both layouts each block keeps some of the channels; it squeezes and rescales them alone, and needs the others' z
// and h. Sums are taken by the functions that the other paths use, in the same order.
#include "../clusters.h"
#include "dense.cuh"
#include "prologue.cuh"

namespace se_ext::cuda {
namespace {

struct BlockLayer {
  const void* weight;
  const void* bias;
  int access, lanes;
  Activation activation;
};

// What the kernel needs besides the visitors. The lines of a share are its channels, in channels_last its tiles.
template <class A>
struct BlockWork {
  Tiling tiling;
  std::int64_t channels, hidden_channels, points, first_sample;
  std::int64_t unit;        // the blocks share out the channels in units of so many
  std::int64_t kept;        // lines of a share, from the first on, that stay in shared memory
  std::int64_t part_bytes;  // of the slab, per block
  BandLayout layout;        // channels_last: over a block's share
  std::int64_t stage;       // lines that are copied and then summed at a time
  Divider by_points;
  BlockLayer first, second;
  bool weights_are_wide;  // in the accumulation type beside half-typed maps
  A *z, *hidden, *scale;  // in global memory; null: not wanted
};

// Where things are in a block's shared memory; the same in every block of the cluster.
template <class A>
struct SharedPlan {
  std::int64_t z, h, scale, combine, bytes;

  SE_EXT_HOST_DEVICE SharedPlan(std::int64_t part_bytes, std::int64_t channels, std::int64_t hidden_channels,
                                std::int64_t combined) {
    std::int64_t next = part_bytes;
    const auto take = [&](std::int64_t items) {
      const std::int64_t at = next;
      next += (items * static_cast<std::int64_t>(sizeof(A)) + 15) / 16 * 16;
      return at;
    };
    z = take(channels);
    h = take(hidden_channels);
    scale = take(channels);
    combine = take(combined);
    bytes = next;
  }
};

// Accesses in which sum_band and the sums of its tiles have room.
SE_EXT_HOST_DEVICE std::int64_t items_to_combine(const BandLayout& layout) {
  return kThreads + layout.tiles * layout.width;
}

// A block's share of `items`, given out in units.
struct Share {
  std::int64_t begin, end;
  SE_EXT_HOST_DEVICE Share(std::int64_t items, std::int64_t unit, int rank, int ranks)
      : begin(items / unit * rank / ranks * unit),
        end(rank + 1 == ranks ? items : items / unit * (rank + 1) / ranks * unit) {}
};

// Loads the stages of a share and uses each as soon as it is there, while the next kStagesAhead are on their way.
constexpr int kStagesAhead = 3;
constexpr std::int64_t kStageBytes = 16 * 1024;

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

// Asks for these rows of a layer's weight.
SE_EXT_DEVICE void prefetch_rows(const BlockLayer& l, std::int64_t row_bytes, Share rows) {
  constexpr std::int64_t kLine = 128;
  const char* weight = static_cast<const char*>(l.weight);
  for (std::int64_t i = rows.begin * row_bytes + threadIdx.x * kLine; i < rows.end * row_bytes; i += kThreads * kLine) {
    prefetch(weight + i);
  }
}

// Rows [begin, end) of a layer for one vector: put(row, hidden, activated) once per row.
template <int n, class W, class A, class Put>
SE_EXT_DEVICE void layer_rows(const BlockLayer& l, const A* vector, std::int64_t columns, Share rows, const Put& put) {
  const W* weight = static_cast<const W*>(l.weight);
  const W* bias = static_cast<const W*>(l.bias);
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t start = rows.begin; start < rows.end; start += kThreads / l.lanes) {
    const std::int64_t mine = start + thread / l.lanes;
    const std::int64_t row = mine < rows.end ? mine : rows.end - 1;
    const A sum = dot<n, 1>(weight + row * columns, vector, 0, columns, l.lanes)[0];
    if (mine < rows.end && (thread & (l.lanes - 1)) == 0) {
      const A value = sum + (bias ? load<1>(bias + row)[0] : A(0));
      put(row, value, activate_one(l.activation, value));
    }
  }
}

template <class T, class A, class Put>
SE_EXT_DEVICE void layer(const BlockLayer& l, bool is_wide, const A* vector, std::int64_t columns, Share rows,
                         const Put& put) {
  if constexpr (kIsHalf<T>) {
    if (is_wide) {
      if (l.access == 1) {
        layer_rows<1, A>(l, vector, columns, rows, put);
      } else {
        layer_rows<kFull<A>, A>(l, vector, columns, rows, put);
      }
      return;
    }
  }
  if (l.access == 1) {
    layer_rows<1, T>(l, vector, columns, rows, put);
  } else {
    layer_rows<kFull<T>, T>(l, vector, columns, rows, put);
  }
}

// Gives this block's share of a vector to the other blocks, which keep the vector at the same place. Stores to their
// memory wait for nothing; loads from it would, one block after another.
template <class A>
SE_EXT_DEVICE void push(A* vector, Share share, int rank, int ranks) {
  for (std::int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads) {
    const A value = vector[i];
    for (int r = 0; r < ranks; ++r) {
      if (r != rank) *shared_of_rank(vector + i, r) = value;
    }
  }
}

// A visitor that sums what is not kept. It reads far memory directly, by one thread block of a multiprocessor: with
// more accesses ahead.
template <class Visitor>
struct FurtherAhead : Visitor {
  static constexpr int kAhead = sizeof(typename Visitor::value_type) > 4 ? Visitor::kAhead : 2 * Visitor::kAhead;
};

enum class Writing { Rows, AcrossRows, Bands };

template <Writing writing, int n, class Squeeze, class Rescale>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    block_kernel(Squeeze squeeze, Rescale rescale, BlockWork<acc_t<typename Squeeze::value_type>> w) {
  using T = typename Squeeze::value_type;
  using A = acc_t<T>;
  const int rank = cluster_rank(), ranks = cluster_size(), thread = static_cast<int>(threadIdx.x);
  const std::int64_t C = w.channels, M = w.hidden_channels, P = w.points, tiles = w.tiling.tiles;
  const std::int64_t sample = w.first_sample + blockIdx.x / static_cast<unsigned>(ranks);
  const Share mine(C, w.unit, rank, ranks), my_hidden(M, 1, rank, ranks);
  const std::int64_t width = mine.end - mine.begin;

  char* shared = dynamic_shared();
  const SharedPlan<A> at(w.part_bytes, C, M, writing == Writing::Bands ? items_to_combine(w.layout) * n : 0);
  A* z = reinterpret_cast<A*>(shared + at.z);
  A* h = reinterpret_cast<A*>(shared + at.h);
  A* scale = reinterpret_cast<A*>(shared + at.scale);

  cluster_arrive();
  const std::int64_t weight_bytes = w.weights_are_wide ? sizeof(A) : sizeof(T);
  prefetch_rows(w.first, C * weight_bytes, my_hidden);
  prefetch_rows(w.second, M * weight_bytes, mine);

  // Here and in shared memory x begins with this block's share, and the scale is this sample's alone.
  const T* const from =
      squeeze.x + (writing == Writing::Bands ? sample * C * P + mine.begin : (sample * C + mine.begin) * P);
  T* const part = reinterpret_cast<T*>(shared + (reinterpret_cast<std::uintptr_t>(from) & 15));
  squeeze.x = rescale.x = from;
  rescale.scale = scale;
  rescale.channels = 0;
  const FurtherAhead<Squeeze> squeeze_rest{squeeze};
  Squeeze squeeze_kept = squeeze;
  Rescale rescale_kept = rescale;
  squeeze_kept.x = rescale_kept.x = part;
  const std::int64_t lines = writing == Writing::Bands ? tiles : width, kept = smaller(w.kept, lines);
  const std::int64_t stages = (kept + w.stage - 1) / w.stage;
  const auto x_of_band = [=](std::int64_t point, std::int64_t channel) { return point * C + channel - mine.begin; };
  const auto x_of_kept = [=](std::int64_t point, std::int64_t channel) { return point * width + channel - mine.begin; };

  if constexpr (writing == Writing::Bands) {
    A* const combine = reinterpret_cast<A*>(shared + at.combine);
    A* const tile_sums = combine + kThreads * n;
    const int wide = w.layout.width * n;
    const auto sum_lines = [&](const auto& visitor, std::int64_t begin, std::int64_t end, const auto& index) {
      for (std::int64_t t = begin; t < end; t += w.layout.tiles) {
        for (std::int64_t first = mine.begin; first < mine.end; first += wide) {
          sum_band<n>(
              visitor, sample, first, mine.end, t, w.tiling, w.layout, P, combine, index,
              [&](int, int tile, std::int64_t channel, A sum) { tile_sums[tile * wide + channel - first] = sum; });
          // As sum_tiles: a channel is always the same thread's.
          const std::int64_t c = first + thread, left = tiles - t;
          if (thread < wide && c < mine.end) {
            A sum = t == 0 ? tile_sums[thread] : z[c] + tile_sums[thread];
            for (int i = 1; i < w.layout.tiles && i < left; ++i) sum += tile_sums[i * wide + thread];
            z[c] = left <= w.layout.tiles ? sum / static_cast<A>(P) : sum;
          }
        }
      }
    };
    const auto load = [&](std::int64_t stage) {
      const std::int64_t begin = stage * w.stage, end = smaller(begin + w.stage, kept);
      const std::int64_t point = begin * w.tiling.extent, end_point = smaller(end * w.tiling.extent, P);
      fetch_rows<n>(from + point * C, end_point - point, width, C, part + point * width);
    };
    in_stages(stages, load, [&](std::int64_t stage) {
      sum_lines(squeeze_kept, stage * w.stage, smaller((stage + 1) * w.stage, kept), x_of_kept);
    });
    sum_lines(squeeze_rest, kept, lines, x_of_band);
  } else {
    const auto sum_lines = [&](const auto& visitor, std::int64_t begin, std::int64_t end) {
      for (std::int64_t start = begin; start < end; start += kThreads / w.tiling.lanes) {
        const std::int64_t mine_of_start = start + thread / w.tiling.lanes;
        const std::int64_t line = mine_of_start < end ? mine_of_start : end - 1, channel = mine.begin + line;
        const A sum = sum_tiles<A>(tiles, [&](std::int64_t t) {
          return sum_row<n>(visitor, sample, channel, line, t, w.tiling, P / n).part[0][0];
        });
        if (mine_of_start < end && (thread & (w.tiling.lanes - 1)) == 0) z[channel] = sum / static_cast<A>(P);
      }
    };
    const auto load = [&](std::int64_t stage) {
      const std::int64_t begin = stage * w.stage, end = smaller(begin + w.stage, kept);
      fetch(from + begin * P, (end - begin) * P, part + begin * P);
    };
    in_stages(stages, load, [&](std::int64_t stage) {
      sum_lines(squeeze_kept, stage * w.stage, smaller((stage + 1) * w.stage, kept));
    });
    sum_lines(squeeze_rest, kept, lines);
  }
  __syncthreads();
  cluster_wait();  // all blocks have begun: their memory may be written to
  push(z, mine, rank, ranks);
  cluster_barrier();

  layer<T>(w.first, w.weights_are_wide, z, C, my_hidden, [&](std::int64_t row, A before, A after) {
    h[row] = after;
    if (w.hidden) w.hidden[sample * M + row] = before;
  });
  if (w.z) {
    for (std::int64_t c = mine.begin + thread; c < mine.end; c += kThreads) w.z[sample * C + c] = z[c];
  }
  __syncthreads();
  push(h, my_hidden, rank, ranks);
  cluster_barrier();  // nobody writes to another block's memory from here on
  layer<T>(w.second, w.weights_are_wide, h, M, mine, [&](std::int64_t row, A, A after) {
    scale[row] = after;
    if (w.scale) w.scale[sample * C + row] = after;
  });
  __syncthreads();

  const auto write_lines = [&](const Rescale& visitor, std::int64_t begin, std::int64_t end, const auto& index) {
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
      for (std::int64_t first = mine.begin; first < mine.end; first += w.layout.width * n) {
        write_band<n>(visitor, sample, first, mine.end, point, end_point, w.layout, C, P, index);
      }
    }
  };
  write_lines(rescale, kept, lines, x_of_band);  // what was read last is in the cache
  write_lines(rescale_kept, 0, kept, x_of_kept);
}

// Channels whose values begin at a multiple of 16 bytes, where there are such.
std::int64_t unit_of(const Slab& slab, DType type) {
  const int full = full_access(type);
  return slab.channels % full == 0 ? full : 1;
}

// The channels of the block that has most.
std::int64_t most_channels(const Slab& slab, DType type, int cluster) {
  const std::int64_t unit = unit_of(slab, type);
  return divide_up(slab.channels / unit, cluster) * unit;
}

BandLayout layout_of(DType type, const Slab& slab, int cluster) {
  const Tiling tiling = Tiling::of(slab, type);
  return slab.layout == Layout::ChannelsLast
             ? BandLayout::of_share(tiling, most_channels(slab, type, cluster) / tiling.access)
             : BandLayout{};
}

std::int64_t part_bytes_of(DType type, const Slab& slab, Cluster cluster) {
  const std::int64_t channels = most_channels(slab, type, cluster.blocks);
  const std::int64_t items = slab.layout == Layout::ChannelsLast
                                 ? std::min(cluster.kept * Tiling::of(slab, type).extent, slab.points) * channels
                                 : std::min(cluster.kept, channels) * slab.points;
  return divide_up(items * size_of(type) + 15, 16) * 16;  // from any offset
}

template <class A>
SharedPlan<A> shared_plan(DType type, const Slab& slab, std::int64_t hidden_channels, Cluster cluster) {
  const bool in_bands = slab.layout == Layout::ChannelsLast;
  return {part_bytes_of(type, slab, cluster), slab.channels, hidden_channels,
          in_bands ? items_to_combine(layout_of(type, slab, cluster.blocks)) * Tiling::of(slab, type).access : 0};
}

// Whole turns of the sums' loop, whose copies begin at multiples of 16 bytes from the start of the share.
std::int64_t stage_of(DType type, const Slab& slab, int cluster) {
  const Tiling tiling = Tiling::of(slab, type);
  const bool in_bands = slab.layout == Layout::ChannelsLast;
  const std::int64_t turn = in_bands ? layout_of(type, slab, cluster).tiles : kThreads / tiling.lanes;
  const std::int64_t items = in_bands ? tiling.extent * most_channels(slab, type, cluster) : slab.points;
  return turn * std::max<std::int64_t>(1, kStageBytes / (turn * items * size_of(type)));
}

// f(kernel) with the kernel of a slab
template <class Squeeze, class Rescale, class F>
auto with_kernel(const Slab& slab, DType type, const F& f) {
  using T = typename Squeeze::value_type;
  const int access = Tiling::of(slab, type).access;
  if (slab.layout == Layout::ChannelsLast) {
    return access == 1 ? f(block_kernel<Writing::Bands, 1, Squeeze, Rescale>)
                       : f(block_kernel<Writing::Bands, kFull<T>, Squeeze, Rescale>);
  }
  if (writes_across_rows(slab, type)) return f(block_kernel<Writing::AcrossRows, 1, Squeeze, Rescale>);
  return with_access<T>(access, [&]<int n>() { return f(block_kernel<Writing::Rows, n, Squeeze, Rescale>); });
}

template <class Squeeze, class Rescale>
cudaError_t launch_cluster(const Batch& batch, Cluster cluster, const ClusterExcitation& excitation,
                           const Squeeze& squeeze, const Rescale& rescale) {
  using A = acc_t<typename Squeeze::value_type>;
  const auto layer = [](const Layer& l) {
    const DotPlan plan(l.columns, l.type);
    return BlockLayer{l.weight, l.bias, plan.access, plan.lanes, l.activation};
  };
  const BlockWork<A> work{Tiling::of(batch.slab, batch.dtype),
                          batch.slab.channels,
                          excitation.first.rows,
                          batch.slab.points,
                          batch.first,
                          unit_of(batch.slab, batch.dtype),
                          cluster.kept,
                          part_bytes_of(batch.dtype, batch.slab, cluster),
                          layout_of(batch.dtype, batch.slab, cluster.blocks),
                          stage_of(batch.dtype, batch.slab, cluster.blocks),
                          Divider(batch.slab.points),
                          layer(excitation.first),
                          layer(excitation.second),
                          excitation.first.type != batch.dtype,
                          static_cast<A*>(excitation.z),
                          static_cast<A*>(excitation.hidden),
                          static_cast<A*>(excitation.scale)};
  const std::int64_t shared = shared_plan<A>(batch.dtype, batch.slab, excitation.first.rows, cluster).bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(batch.samples * cluster.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = batch.stream;
  config.attrs = &attribute;
  config.numAttrs = cluster.blocks > 1 ? 1 : 0;
  return with_kernel<Squeeze, Rescale>(batch.slab, batch.dtype, [&](auto kernel) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
    return error != cudaSuccess ? error : cudaLaunchKernelEx(&config, kernel, squeeze, rescale, work);
  });
}

}  // namespace

std::int64_t cluster_shared_bytes(DType dtype, const Slab& slab, std::int64_t hidden_channels, Cluster cluster) {
  return dtype == DType::Float64 ? shared_plan<double>(dtype, slab, hidden_channels, cluster).bytes
                                 : shared_plan<float>(dtype, slab, hidden_channels, cluster).bytes;
}

std::int64_t cluster_lines(DType dtype, const Slab& slab, int blocks) {
  return slab.layout == Layout::ChannelsLast ? Tiling::of(slab, dtype).tiles : most_channels(slab, dtype, blocks);
}

std::int64_t cluster_keeps(DType dtype, const Slab& slab, std::int64_t hidden_channels, int blocks,
                           std::int64_t shared_bytes) {
  const bool in_bands = slab.layout == Layout::ChannelsLast;
  const std::int64_t values =
      in_bands ? Tiling::of(slab, dtype).extent * most_channels(slab, dtype, blocks) : slab.points;
  const std::int64_t step = in_bands ? layout_of(dtype, slab, blocks).tiles : unit_of(slab, dtype);
  const std::int64_t room = shared_bytes - 16 - cluster_shared_bytes(dtype, slab, hidden_channels, {blocks, 0});
  const std::int64_t lines = std::max<std::int64_t>(0, room / (values * size_of(dtype)));
  return std::min(lines / step * step, cluster_lines(dtype, slab, blocks));
}

bool cluster_can_launch(DType dtype, const Slab& slab, std::int64_t hidden_channels, bool has_prologue,
                        Cluster cluster) {
  const ClusterShape shape{cluster.blocks, kThreads, cluster_shared_bytes(dtype, slab, hidden_channels, cluster)};
  const auto ask = [&](auto kernel) { return can_launch(reinterpret_cast<const void*>(kernel), shape); };
  return with_type(dtype, [&]<class T>(T) {
    return has_prologue ? with_kernel<SumPrologue<T>, WritePrologueRescale<T, Any, Any>>(slab, dtype, ask)
                        : with_kernel<SumInput<T>, WriteRescale<T, Any>>(slab, dtype, ask);
  });
}

cudaError_t write_by_cluster(const Batch& batch, Cluster cluster, const ClusterExcitation& excitation,
                             const RescaleMaps& m, const Prologue* prologue, const void* drop) {
  if (batch.samples == 0 || batch.slab.channels == 0 || batch.slab.points == 0) return cudaSuccess;
  return with_type(batch.dtype, [&]<class T>(T) {
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(m.x);
    if (prologue) {
      return launch_cluster(
          batch, cluster, excitation,
          SumPrologue<T>{
              {x}, static_cast<const A*>(prologue->a), static_cast<const A*>(prologue->b), Any(prologue->pre)},
          make_rescale<T>(batch, *prologue, drop, m, Any(prologue->pre), Any(m.post)));
    }
    return launch_cluster(batch, cluster, excitation, SumInput<T>{x},
                          WriteRescale<T, Any>{x, nullptr, static_cast<const T*>(m.residual), static_cast<T*>(m.y),
                                               Any(m.post), batch.slab.channels, batch.streaming});
  });
}

}  // namespace se_ext::cuda
