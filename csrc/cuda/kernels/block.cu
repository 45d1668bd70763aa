// The whole block of a sample in one kernel: the blocks of a cluster keep the sample's slab in their shared memory from
// the squeeze to the rescale, so that x is read once. Before sm_90 a cluster is one block.
//
// ChannelsFirst: each block keeps some of the channels; it squeezes and rescales them alone, and needs the others' z
// and h. ChannelsLast: each block keeps some of the tiles of points, and needs the others' sums, h and scale. Sums are
// taken by the functions that the other paths use, in the same order.
#include "dense.cuh"
#include "prologue.cuh"

namespace se_ext::cuda {
namespace {

template <class A>
struct BlockLayer {
  const void* weight;
  const void* bias;
  int access, lanes;
  Activation activation;
};

// What the kernel needs besides the visitors.
template <class A>
struct BlockWork {
  Tiling tiling;
  std::int64_t channels, hidden_channels, points, first_sample;
  std::int64_t unit;        // ChannelsFirst: blocks share out the channels in units of so many
  std::int64_t part_bytes;  // of the slab, per block
  Divider by_points;
  BlockLayer<A> first, second;
  bool weights_are_wide;  // in the accumulation type beside half-typed maps
  A *z, *hidden, *scale;  // in global memory; null: not wanted
};

// Where things are in a block's shared memory; the same in every block of the cluster.
template <class A>
struct SharedPlan {
  std::int64_t z, h, scale, partials, combine, bytes;

  SE_EXT_HOST_DEVICE SharedPlan(std::int64_t part_bytes, std::int64_t channels, std::int64_t hidden_channels,
                                std::int64_t tiles_of_block, int access) {
    std::int64_t next = part_bytes;
    const auto take = [&](std::int64_t items) {
      const std::int64_t at = next;
      next += (items * static_cast<std::int64_t>(sizeof(A)) + 15) / 16 * 16;
      return at;
    };
    z = take(channels);
    h = take(hidden_channels);
    scale = take(channels);
    partials = take(tiles_of_block * channels);
    combine = take(tiles_of_block > 0 ? kThreads * access : 0);
    bytes = next;
  }
};

// A block's share of `items`, given out in units.
struct Share {
  std::int64_t begin, end;
  SE_EXT_HOST_DEVICE Share(std::int64_t items, std::int64_t unit, int rank, int ranks)
      : begin(items / unit * rank / ranks * unit),
        end(rank + 1 == ranks ? items : items / unit * (rank + 1) / ranks * unit) {}
};

// Copies [from, from + count) to shared memory, at the same offset from an address that is a multiple of 16.
template <class T>
SE_EXT_DEVICE T* fetch(const T* from, std::int64_t count, char* shared) {
  const auto offset = static_cast<int>(reinterpret_cast<std::uintptr_t>(from) & 15);
  T* to = reinterpret_cast<T*>(shared + offset);
  const std::int64_t to_aligned = (offset ? 16 - offset : 0) / static_cast<int>(sizeof(T));
  const std::int64_t head = to_aligned < count ? to_aligned : count;
  const std::int64_t accesses = (count - head) / kFull<T>;
  for (std::int64_t i = threadIdx.x; i < accesses; i += kThreads) {
    copy16(to + head + i * kFull<T>, from + head + i * kFull<T>);
  }
  for (std::int64_t i = threadIdx.x; i < head; i += kThreads) to[i] = from[i];
  for (std::int64_t i = head + accesses * kFull<T> + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  return to;
}

// Rows [begin, end) of a layer for one vector: put(row, hidden, activated) once per row.
template <int n, class W, class A, class Put>
SE_EXT_DEVICE void layer_rows(const BlockLayer<A>& l, const A* vector, std::int64_t columns, Share rows,
                              const Put& put) {
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
SE_EXT_DEVICE void layer(const BlockLayer<A>& l, bool is_wide, const A* vector, std::int64_t columns, Share rows,
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

// Fetches the other blocks' shares of a vector that all of them keep at the same place.
template <class A>
SE_EXT_DEVICE void gather(A* vector, std::int64_t items, std::int64_t unit, int rank, int ranks) {
  for (int r = 0; r < ranks; ++r) {
    if (r == rank) continue;
    const A* there = shared_of_rank(vector, r);
    const Share share(items, unit, r, ranks);
    for (std::int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads) vector[i] = there[i];
  }
}

enum class Writing { Rows, AcrossRows, Bands };

template <Writing writing, int n, class Squeeze, class Rescale>
__global__ void __launch_bounds__(kThreads, 1)
    block_kernel(Squeeze squeeze, Rescale rescale, BlockWork<acc_t<typename Squeeze::value_type>> w) {
  using T = typename Squeeze::value_type;
  using A = acc_t<T>;
  constexpr bool kFirst = writing != Writing::Bands;
  const int rank = cluster_rank(), ranks = cluster_size(), thread = static_cast<int>(threadIdx.x);
  const std::int64_t C = w.channels, M = w.hidden_channels, P = w.points, tiles = w.tiling.tiles;
  const std::int64_t sample = w.first_sample + blockIdx.x / static_cast<unsigned>(ranks);
  const Share mine = kFirst ? Share(C, w.unit, rank, ranks) : Share(tiles, 1, rank, ranks);
  const std::int64_t last_point = mine.end * w.tiling.extent < P ? mine.end * w.tiling.extent : P;
  const std::int64_t begin = kFirst ? mine.begin * P : mine.begin * w.tiling.extent * C;
  const std::int64_t end = kFirst ? mine.end * P : last_point * C;

  char* shared = dynamic_shared();
  const SharedPlan<A> at(w.part_bytes, C, M, kFirst ? 0 : (tiles + ranks - 1) / ranks, n);
  A* z = reinterpret_cast<A*>(shared + at.z);
  A* h = reinterpret_cast<A*>(shared + at.h);
  A* scale = reinterpret_cast<A*>(shared + at.scale);
  A* partials = reinterpret_cast<A*>(shared + at.partials);

  // The visitors go on counting from the start of the batch.
  const std::int64_t offset = sample * C * P + begin;
  squeeze.x = fetch(squeeze.x + offset, end - begin, shared) - offset;
  rescale.x = squeeze.x;
  rescale.scale = scale - sample * C;
  copies_wait();
  __syncthreads();

  if constexpr (kFirst) {
    for (std::int64_t start = mine.begin; start < mine.end; start += kThreads / w.tiling.lanes) {
      const std::int64_t c = start + thread / w.tiling.lanes;
      const std::int64_t channel = c < mine.end ? c : mine.end - 1;
      const A sum = sum_tiles<A>(tiles, [&](std::int64_t t) {
        return sum_row<n>(squeeze, sample, channel, sample * C + channel, t, w.tiling, P / n).part[0][0];
      });
      if (c < mine.end && (thread & (w.tiling.lanes - 1)) == 0) z[channel] = sum / static_cast<A>(P);
    }
    cluster_barrier();
    gather(z, C, w.unit, rank, ranks);
  } else {
    for (std::int64_t t = mine.begin; t < mine.end; ++t) {
      for (std::int64_t band = 0; band < w.tiling.bands; ++band) {
        sum_band<n>(squeeze, sample, band, t, w.tiling, C, P, reinterpret_cast<A*>(shared + at.combine),
                    [&](int, std::int64_t channel, A sum) { partials[(t - mine.begin) * C + channel] = sum; });
      }
    }
    cluster_barrier();
    for (std::int64_t c = thread; c < C; c += kThreads) {
      int r = 0;
      Share there(tiles, 1, 0, ranks);
      const A sum = sum_tiles<A>(tiles, [&](std::int64_t t) {
        while (t >= there.end) there = Share(tiles, 1, ++r, ranks);
        return shared_of_rank(partials, r)[(t - there.begin) * C + c];
      });
      z[c] = sum / static_cast<A>(P);
    }
  }
  __syncthreads();

  layer<T>(w.first, w.weights_are_wide, z, C, Share(M, 1, rank, ranks), [&](std::int64_t row, A before, A after) {
    h[row] = after;
    if (w.hidden) w.hidden[sample * M + row] = before;
  });
  if (w.z) {
    const Share of_z(C, w.unit, rank, ranks);
    for (std::int64_t c = of_z.begin + thread; c < of_z.end; c += kThreads) w.z[sample * C + c] = z[c];
  }
  cluster_barrier();
  gather(h, M, 1, rank, ranks);
  if constexpr (kFirst) {
    cluster_barrier();  // nobody reads another block's memory from here on
  } else {
    __syncthreads();
  }
  const Share of_scale(C, w.unit, rank, ranks);
  layer<T>(w.second, w.weights_are_wide, h, M, of_scale, [&](std::int64_t row, A, A after) {
    scale[row] = after;
    if (w.scale) w.scale[sample * C + row] = after;
  });
  if constexpr (kFirst) {
    __syncthreads();
  } else {
    cluster_barrier();
    gather(scale, C, w.unit, rank, ranks);
    cluster_barrier();
  }

  if constexpr (writing == Writing::Rows) {
    const int lanes = w.tiling.lanes;
    for (std::int64_t c = mine.begin + thread / lanes; c < mine.end; c += kThreads / lanes) {
      for (std::int64_t t = 0; t < tiles; ++t) write_row<n>(rescale, sample, c, sample * C + c, t, w.tiling, P / n);
    }
  } else if constexpr (writing == Writing::AcrossRows) {
    write_across_rows<kFull<T>>(rescale, sample, begin / kFull<T>, end / kFull<T>, thread, kThreads, C, w.by_points);
  } else {
    for (std::int64_t band = 0; band < w.tiling.bands; ++band) {
      write_band<n>(rescale, sample, band, mine.begin * w.tiling.extent, last_point, w.tiling, C, P);
    }
  }
}

// How many of the channels, or none: units whose slabs begin at a multiple of 16 bytes.
std::int64_t unit_of(const Slab& slab, DType type) {
  const int full = full_access(type);
  return slab.layout == Layout::ChannelsFirst && slab.channels % full == 0 ? full : 1;
}

std::int64_t part_bytes_of(DType type, const Slab& slab, int cluster) {
  const Tiling tiling = Tiling::of(slab, type);
  std::int64_t items;
  if (slab.layout == Layout::ChannelsFirst) {
    const std::int64_t unit = unit_of(slab, type);
    // Units shared out evenly, and in the last block the channels that make no whole unit.
    items = (divide_up(slab.channels / unit, cluster) * unit + slab.channels % unit) * slab.points;
  } else {
    items = divide_up(tiling.tiles, cluster) * tiling.extent * slab.channels;
  }
  return divide_up(items * size_of(type) + 15, 16) * 16;  // from any offset
}

template <class A>
SharedPlan<A> shared_plan(DType type, const Slab& slab, std::int64_t hidden_channels, int cluster) {
  const Tiling tiling = Tiling::of(slab, type);
  const bool is_first = slab.layout == Layout::ChannelsFirst;
  return {part_bytes_of(type, slab, cluster), slab.channels, hidden_channels,
          is_first ? 0 : divide_up(tiling.tiles, cluster), tiling.access};
}

template <Writing writing, int n, class Squeeze, class Rescale>
cudaError_t launch_block(const Batch& batch, int cluster, const Block& block, const Squeeze& squeeze,
                         const Rescale& rescale) {
  using A = acc_t<typename Squeeze::value_type>;
  const auto kernel = block_kernel<writing, n, Squeeze, Rescale>;
  const auto layer = [](const Layer& l) {
    const DotPlan plan(l.columns, l.type);
    return BlockLayer<A>{l.weight, l.bias, plan.access, plan.lanes, l.activation};
  };
  const BlockWork<A> work{Tiling::of(batch.slab, batch.dtype),
                          batch.slab.channels,
                          block.first.rows,
                          batch.slab.points,
                          batch.first,
                          unit_of(batch.slab, batch.dtype),
                          part_bytes_of(batch.dtype, batch.slab, cluster),
                          Divider(batch.slab.points),
                          layer(block.first),
                          layer(block.second),
                          block.first.type != batch.dtype,
                          static_cast<A*>(block.z),
                          static_cast<A*>(block.hidden),
                          static_cast<A*>(block.scale)};
  const std::int64_t shared = shared_plan<A>(batch.dtype, batch.slab, block.first.rows, cluster).bytes;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(batch.samples * cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = batch.stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, squeeze, rescale, work);
}

template <class Squeeze, class Rescale>
cudaError_t choose_block(const Batch& batch, int cluster, const Block& block, const Squeeze& squeeze,
                         const Rescale& rescale) {
  using T = typename Squeeze::value_type;
  const Tiling tiling = Tiling::of(batch.slab, batch.dtype);
  if (batch.slab.layout == Layout::ChannelsLast) {
    return tiling.access == 1 ? launch_block<Writing::Bands, 1>(batch, cluster, block, squeeze, rescale)
                              : launch_block<Writing::Bands, kFull<T>>(batch, cluster, block, squeeze, rescale);
  }
  if (writes_across_rows(batch.slab, batch.dtype)) {
    return launch_block<Writing::AcrossRows, 1>(batch, cluster, block, squeeze, rescale);
  }
  return with_access<T>(
      tiling.access, [&]<int n>() { return launch_block<Writing::Rows, n>(batch, cluster, block, squeeze, rescale); });
}

}  // namespace

std::int64_t block_shared_bytes(DType dtype, const Slab& slab, std::int64_t hidden_channels, int cluster) {
  return dtype == DType::Float64 ? shared_plan<double>(dtype, slab, hidden_channels, cluster).bytes
                                 : shared_plan<float>(dtype, slab, hidden_channels, cluster).bytes;
}

cudaError_t write_block(const Batch& batch, int cluster, const Block& block, const RescaleMaps& m,
                        const Prologue* prologue, const void* drop) {
  if (batch.samples == 0 || batch.slab.channels == 0 || batch.slab.points == 0) return cudaSuccess;
  return with_type(batch.dtype, [&]<class T>(T) {
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(m.x);
    if (prologue) {
      return choose_block(
          batch, cluster, block,
          SumPrologue<T>{
              {x}, static_cast<const A*>(prologue->a), static_cast<const A*>(prologue->b), Any(prologue->pre)},
          make_rescale<T>(batch, *prologue, drop, m, Any(prologue->pre), Any(m.post)));
    }
    return choose_block(batch, cluster, block, SumInput<T>{x},
                        WriteRescale<T, Any>{x, nullptr, static_cast<const T*>(m.residual), static_cast<T*>(m.y),
                                             Any(m.post), batch.slab.channels, batch.streaming});
  });
}

}  // namespace se_ext::cuda
