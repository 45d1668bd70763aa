// A depthwise convolution: each channel of the map meets a filter of its own.
//
// One kernel computes a row of points whose channels lie one behind the other (kernels/depthwise). A ChannelsLast map
// is made of such rows. Of a ChannelsFirst map, as many channels as a register has lanes are turned into such rows in
// scratch memory, a band of rows at a time that stays in cache, and the rows of the result are turned back.
//
// Here is what forward (depthwise_conv.cpp) and backward (depthwise_conv_backward.cpp) share.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../feature_map.h"
#include "../ops/adapters.h"
#include "convolution.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tiling.h"

namespace se_ext::cpu {

inline constexpr std::int64_t kBandBytes = 192 * 1024;  // of rows that are read more than once: in the second cache

// Whether the kernels compute it, in time that is worth it; else ATen does.
inline bool has_kernels(const Convolution& conv) {
  const Convolution::Dim& w = conv.width;
  return (w.kernel == 3 || w.kernel == 5 || w.kernel == 7) && w.stride <= 2 && w.dilation == 1;
}

// A convolution on maps of one kind: what all of its passes know.
struct Work {
  const Convolution& conv;
  const FeatureMap x, y;                // y, or its gradient
  const DType sum_type;                 // the accumulation type
  const DepthwiseKernels& stored;       // on maps as they are
  const DepthwiseKernels& accumulated;  // on blocks, in the accumulation type
  const std::int64_t channels, lanes, blocks, taps;

  Work(const Convolution& c, const Tensor& input, const Tensor& output)
      : conv(c),
        x(beside(input, output)),
        y(output),
        sum_type(x.dtype == DType::Float64 ? DType::Float64 : DType::Float32),
        stored(depthwise_kernels(x.dtype)),
        accumulated(depthwise_kernels(sum_type)),
        channels(x.slab.channels),
        lanes(accumulated.lanes),
        blocks(ceil_div(channels, lanes)),
        taps(conv.taps()) {}

  std::int64_t sum_bytes() const { return sum_type == DType::Float64 ? 8 : 4; }
  bool is_channels_last() const { return x.slab.layout == Layout::ChannelsLast; }
  std::int64_t block_channels(std::int64_t block) const { return std::min(lanes, channels - block * lanes); }
  // Threads for a pass that multiplies every value as often as there are taps.
  int threads() const {
    return threads_for(x.samples * (x.slab_bytes() + y.slab_bytes()) * std::max<std::int64_t>(1, taps / 8));
  }

 private:
  // A map of one point is in both layouts: its own is that of the map beside it, which padding may have made larger.
  static FeatureMap beside(const Tensor& input, const Tensor& output) {
    FeatureMap map(input);
    if (map.slab.points == 1) map.slab.layout = FeatureMap(output).slab.layout;
    return map;
  }
};

// An empty list for each thread, with room for `size` values. A thread moves its own out: in a parallel region nothing
// may throw, so nothing may be allocated.
template <class T>
std::vector<std::vector<T>> lists(int threads, std::int64_t size) {
  std::vector<std::vector<T>> all(threads);
  for (std::vector<T>& list : all) list.reserve(size);
  return all;
}

// The filters, and the biases, in blocks of channels.
class Filters {
 public:
  Filters(const Work& work, const ops::DepthwiseConv& a)
      : work_(work), weight_(a.weight.contiguous()), bias_(a.bias.has_value() ? a.bias->contiguous() : Tensor()) {}

  // Twice the filters, and the biases.
  std::int64_t scratch_items() const { return work_.blocks * (2 * work_.taps + 1) * work_.lanes; }
  static constexpr int kPieces = 3;

  void prepare(Scratch& scratch, bool turned) {
    const std::int64_t lanes = work_.lanes, taps = work_.taps, C = work_.channels;
    const Pointer straight = scratch.take(work_.blocks * taps * lanes);
    const DepthwiseKernels& kernels = depthwise_kernels(dtype_of(weight_));
    kernels.to_blocks(C, taps, taps, taps * lanes, weight_.data_ptr(), straight.base);
    at_ = straight;
    if (bias_.defined()) {
      bias_at_ = scratch.take(work_.blocks * lanes);
      kernels.to_blocks(C, 1, 1, lanes, bias_.data_ptr(), bias_at_.base);
    }
    if (!turned) return;
    // Of each row the taps that are a multiple of the stride, the last one first, and then those that follow them.
    at_ = scratch.take(work_.blocks * taps * lanes);
    const Convolution::Dim& w = work_.conv.width;
    std::int64_t to = 0;
    for (std::int64_t row = 0; row < work_.blocks * work_.conv.filter_rows(); ++row) {
      for (std::int64_t phase = 0; phase < w.stride; ++phase) {
        for (std::int64_t k = w.kernel - 1; k >= 0; --k) {
          if (k % w.stride != phase) continue;
          std::memcpy(at_.at(to++ * lanes), straight.at((row * w.kernel + k) * lanes), lanes * straight.item_bytes);
        }
      }
    }
  }

  std::int64_t block() const { return work_.taps * work_.lanes; }  // values from one to the next
  const void* row(std::int64_t block, std::int64_t filter_row, std::int64_t tap = 0) const {
    return at_.at(((block * work_.conv.filter_rows() + filter_row) * work_.conv.width.kernel + tap) * work_.lanes);
  }
  const void* bias(std::int64_t block) const { return bias_at_.at(block * work_.lanes); }

 private:
  const Work& work_;
  const Tensor weight_, bias_;
  Pointer at_, bias_at_;
};

// Rows as a kernel takes them: of a map in ChannelsLast, or of a block of channels in scratch memory.
struct Rows {
  Pointer at;  // of row `first`
  std::int64_t first;
  std::int64_t columns;  // of a row
  std::int64_t step;     // elements from a point to the next

  void* row(std::int64_t i) const { return at.at((i - first) * columns * step); }
  void* point(std::int64_t i, std::int64_t column) const { return at.at(((i - first) * columns + column) * step); }
};

// The rows of a sample of a ChannelsLast map, from a channel on.
inline Rows rows_of(const FeatureMap& map, std::int64_t sample, std::int64_t channel, std::int64_t columns) {
  Pointer at = map.data;
  at.base = map.data.at(sample * map.slab_elements() + channel);
  return {at, 0, columns, map.slab.channels};
}

// Some rows of a block of channels in scratch memory, from and to a ChannelsFirst map.
class BlockRows {
 public:
  BlockRows(const Work& work, const FeatureMap& map, std::int64_t columns, Pointer memory)
      : work_(work), map_(map), rows_{memory, 0, columns, work.lanes} {}

  const Rows& place(std::int64_t begin) {
    rows_.first = begin;
    return rows_;
  }
  const Rows& read(std::int64_t sample, std::int64_t block, std::int64_t begin, std::int64_t end) {
    work_.stored.to_blocks(work_.block_channels(block), (end - begin) * rows_.columns, map_.slab.points, 0,
                           plane(sample, block, begin), rows_.at.base);
    return place(begin);
  }
  void write(std::int64_t sample, std::int64_t block, std::int64_t begin, std::int64_t end) const {
    work_.stored.from_blocks(work_.block_channels(block), (end - begin) * rows_.columns, map_.slab.points, 0,
                             rows_.at.base, plane(sample, block, begin));
  }

 private:
  void* plane(std::int64_t sample, std::int64_t block, std::int64_t row) const {
    return map_.data.at((sample * work_.channels + block * work_.lanes) * map_.slab.points + row * rows_.columns);
  }

  const Work& work_;
  const FeatureMap& map_;
  Rows rows_;
};

// The bands of a pass over a block of channels, and the rows that the largest of them has on each side.
struct Bands {
  std::vector<Band> all;
  std::int64_t most_rows = 0, most_others = 0;

  void operator()(const Band& band) {
    all.push_back(band);
    most_rows = std::max(most_rows, band.rows());
    most_others = std::max(most_others, band.other_rows());
  }
};

// Rows of the output so that `channels` of them, with what they read of the input, take up a band's bytes.
inline std::int64_t rows_of_band(const Work& work, std::int64_t channels, std::int64_t item_bytes) {
  const Convolution& conv = work.conv;
  const std::int64_t in = ceil_div(conv.in_rows() * conv.width.in, std::max<std::int64_t>(1, conv.out_rows()));
  const std::int64_t bytes = std::max<std::int64_t>(1, (in + conv.width.out) * channels * item_bytes);
  return std::max({std::int64_t{1}, conv.filter_rows() / 2, kBandBytes / bytes});
}

}  // namespace se_ext::cpu
