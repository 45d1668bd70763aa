// A depthwise convolution: each channel of the map meets a filter of its own.
//
// One kernel computes a row of points whose channels lie one behind the other (kernels/depthwise). A ChannelsLast map
// is made of such rows. Of a ChannelsFirst map, as many channels as a register has lanes are turned into such rows in
// scratch memory, a band of rows at a time that stays in cache, and the rows of the result are turned back.
#include <cstring>
#include <vector>

#include "../feature_map.h"
#include "../formula/convolution.h"
#include "../ops/adapters.h"
#include "convolution.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace se_ext {
namespace cpu {
namespace {

constexpr std::int64_t kBandBytes = 192 * 1024;  // of a band's rows, which are read more than once: in the second cache
constexpr std::int64_t kMostGroups = 16;         // of samples, in which the gradients of weights are summed

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Whether the kernels compute it, in time that is worth it; else ATen does.
bool has_kernels(const Convolution& conv) {
  const Convolution::Dim& w = conv.width;
  return (w.kernel == 3 || w.kernel == 5 || w.kernel == 7) && w.stride <= 2 && w.dilation == 1;
}

// A convolution on maps of one kind: what all of its passes know.
struct Work {
  const Convolution& conv;
  const FeatureMap x, y;  // y, or its gradient
  const DepthwiseKernels& stored;      // on maps as they are
  const DepthwiseKernels& accumulated;  // on blocks, in the accumulation type
  const std::int64_t channels, lanes, blocks, taps;

  Work(const Convolution& c, const Tensor& input, const Tensor& output)
      : conv(c),
        x(input),
        y(output),
        stored(depthwise_kernels(x.dtype)),
        accumulated(depthwise_kernels(x.dtype == DType::Float64 ? DType::Float64 : DType::Float32)),
        channels(x.slab.channels),
        lanes(accumulated.lanes),
        blocks(ceil_div(channels, lanes)),
        taps(conv.taps()) {}

  bool is_channels_last() const { return x.slab.layout == Layout::ChannelsLast; }
  std::int64_t block_channels(std::int64_t block) const { return std::min(lanes, channels - block * lanes); }
  // Threads for a pass that multiplies every value as often as there are taps.
  int threads() const {
    return threads_for(x.samples * (x.slab_bytes() + y.slab_bytes()) * std::max<std::int64_t>(1, taps / 8));
  }
};

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

  std::int64_t item_bytes() const { return work_.x.dtype == DType::Float64 ? 8 : 4; }
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
  Pointer at;            // of row `first`
  std::int64_t first;
  std::int64_t columns;  // of a row
  std::int64_t step;     // elements from a point to the next

  void* row(std::int64_t i) const { return at.at((i - first) * columns * step); }
  void* point(std::int64_t i, std::int64_t column) const { return at.at(((i - first) * columns + column) * step); }
};

// A row of the output, of some channels from those of `block` on.
void convolve(const Work& work, const DepthwiseKernels& kernels, const Filters& filters, std::int64_t block,
              std::int64_t channels, const Rows& x, const Rows& y, std::int64_t row, std::vector<ConvolvedRow>& met) {
  const Convolution& conv = work.conv;
  met.clear();
  for (std::int64_t k = 0; k < conv.filter_rows(); ++k) {
    const std::int64_t from = conv.in_row(row, k);
    if (from >= 0) met.push_back({x.row(from), filters.row(block, k)});
  }
  kernels.convolve(static_cast<int>(conv.width.kernel), static_cast<int>(conv.width.stride),
                   {channels, conv.width.out, conv.width.in, -conv.width.begin, x.step, y.step, filters.block(),
                    met.data(), static_cast<int>(met.size()), filters.bias(block), y.row(row)});
}

// A row of the input's gradient. Columns that are `stride` apart meet the same taps: for them it is a convolution of
// stride 1 with these, turned round.
void convolve_back(const Work& work, const DepthwiseKernels& kernels, const Filters& turned, std::int64_t block,
                   std::int64_t channels, const Rows& g, const Rows& gx, std::int64_t row,
                   std::vector<ConvolvedRow>& met) {
  const Convolution& conv = work.conv;
  const Convolution::Dim& w = conv.width;
  std::int64_t tap = 0;
  for (std::int64_t phase = 0; phase < w.stride; ++phase) {
    const std::int64_t taps = ceil_div(w.kernel - phase, w.stride);
    const std::int64_t column = (phase + w.stride - w.begin % w.stride) % w.stride;  // the first of this phase
    met.clear();
    for (std::int64_t k = 0; k < conv.filter_rows(); ++k) {
      const std::int64_t from = conv.out_row(row, k);
      if (from >= 0) met.push_back({g.row(from), turned.row(block, k, tap)});
    }
    const std::int64_t first = (column + w.begin - phase) / w.stride - (taps - 1);
    kernels.convolve(static_cast<int>(taps), 1,
                     {channels, ceil_div(std::max<std::int64_t>(0, w.in - column), w.stride), w.out, first, g.step,
                      w.stride * gx.step, turned.block(), met.data(), static_cast<int>(met.size()), /*bias=*/nullptr,
                      gx.point(row, column)});
    tap += taps;
  }
}

// Adds what rows of g give to the sums of some channels, [filter rows][taps of a row][lanes] and, behind them, the
// bias's [lanes].
void add_gradients(const Work& work, const DepthwiseKernels& kernels, std::int64_t channels, const Rows& x,
                   const Rows& g, std::int64_t begin, std::int64_t end, Pointer sums, bool has_bias,
                   std::vector<const void*>& met) {
  const Convolution& conv = work.conv;
  const int taps = static_cast<int>(conv.width.kernel);
  const std::int64_t at_once = kernels.rows_at_once(taps);
  for (std::int64_t k = 0; k < conv.filter_rows(); k += at_once) {
    const std::int64_t rows = std::min(at_once, conv.filter_rows() - k);
    met.clear();
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t from = conv.in_row(row, k + r);
        met.push_back(from >= 0 ? x.row(from) : nullptr);
      }
    }
    kernels.gradient(taps, static_cast<int>(conv.width.stride), static_cast<int>(rows),
                     {channels, conv.width.out, conv.width.in, -conv.width.begin, x.step, g.columns * g.step,
                      (work.taps + 1) * work.lanes, static_cast<int>(end - begin), g.row(begin), met.data(),
                      sums.at(k * taps * work.lanes), has_bias && k == 0 ? sums.at(work.taps * work.lanes) : nullptr});
  }
}

// The rows of a sample of a ChannelsLast map, from a channel on.
Rows rows_of(const FeatureMap& map, std::int64_t sample, std::int64_t channel, std::int64_t columns) {
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

// Rows of the output so that, with what they read of the input, `channels` of them take up a band's bytes.
std::int64_t rows_of_band(const Work& work, std::int64_t channels, std::int64_t item_bytes) {
  const Convolution& conv = work.conv;
  const std::int64_t in = ceil_div(conv.in_rows() * conv.width.in, std::max<std::int64_t>(1, conv.out_rows()));
  const std::int64_t bytes = std::max<std::int64_t>(1, (in + conv.width.out) * channels * item_bytes);
  return std::max({std::int64_t{1}, conv.filter_rows() / 2, kBandBytes / bytes});
}

void forward(const Work& work, const ops::DepthwiseConv& a) {
  const Convolution& conv = work.conv;
  const FeatureMap &x = work.x, &y = work.y;
  const std::int64_t N = x.samples, out_rows = conv.out_rows();
  const int threads = work.threads();
  Filters filters(work, a);
  Bands bands;
  std::int64_t x_items = 0, y_items = 0;  // of a thread
  if (!work.is_channels_last()) {
    conv.for_output_bands(rows_of_band(work, work.lanes, filters.item_bytes()), bands);
    x_items = bands.most_others * conv.width.in * work.lanes;
    y_items = bands.most_rows * conv.width.out * work.lanes;
  }
  Scratch scratch(filters.scratch_items() + threads * (x_items + y_items), Filters::kPieces + 2 * threads,
                  x.accumulation_options());
  filters.prepare(scratch, /*turned=*/false);

  if (work.is_channels_last()) {
    parallel(threads, [&](Team team) {
      std::vector<ConvolvedRow> met;
      const auto [begin, end] = team.share(N * out_rows);
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t n = i / out_rows;
        convolve(work, work.stored, filters, /*block=*/0, work.channels, rows_of(x, n, 0, conv.width.in),
                 rows_of(y, n, 0, conv.width.out), i % out_rows, met);
      }
    });
    return;
  }
  std::vector<Pointer> x_at, y_at;
  for (int t = 0; t < threads; ++t) {
    x_at.push_back(scratch.take(x_items));
    y_at.push_back(scratch.take(y_items));
  }
  parallel(threads, [&](Team team) {
    std::vector<ConvolvedRow> met;
    BlockRows from(work, x, conv.width.in, x_at[team.rank]), to(work, y, conv.width.out, y_at[team.rank]);
    const auto [begin, end] = team.share(N * work.blocks);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t n = i / work.blocks, block = i % work.blocks;
      for (const Band& band : bands.all) {
        const Rows& in = from.read(n, block, band.other_begin, band.other_end);
        const Rows& out = to.place(band.begin);
        for (std::int64_t row = band.begin; row < band.end; ++row) {
          convolve(work, work.accumulated, filters, block, work.lanes, in, out, row, met);
        }
        to.write(n, block, band.begin, band.end);
      }
    }
  });
}

// The sums that are the gradients of filters and biases, of each group of samples by itself and then of all, in the
// order of the samples: [groups][blocks][taps + 1][lanes].
class GradientSums {
 public:
  GradientSums(const Work& work, const Gradients<3>& to)
      : work_(work), to_(to), samples_(ceil_div(work.x.samples, kMostGroups)) {}

  bool are_wanted() const { return to_[1].defined() || to_[2].defined(); }
  bool has_bias() const { return to_[2].defined(); }
  std::int64_t groups() const { return ceil_div(work_.x.samples, samples_); }
  std::pair<std::int64_t, std::int64_t> group(std::int64_t i) const {
    return {i * samples_, std::min((i + 1) * samples_, work_.x.samples)};
  }
  std::int64_t scratch_items() const { return are_wanted() ? (groups() + 1) * items() : 0; }
  static constexpr int kPieces = 2;
  void use(Scratch& scratch) {
    if (!are_wanted()) return;
    partial_ = scratch.take(groups() * items());
    total_ = scratch.take(items());
  }
  Pointer of(std::int64_t group, std::int64_t block) const {
    Pointer p = partial_;
    p.base = partial_.at(group * items() + block * block_items());
    return p;
  }
  void clear(std::int64_t group, std::int64_t block, std::int64_t blocks) const {
    std::memset(of(group, block).base, 0, blocks * block_items() * partial_.item_bytes);
  }
  void write() const {
    if (!are_wanted()) return;
    const DType type = work_.x.dtype == DType::Float64 ? DType::Float64 : DType::Float32;
    kernels().dense[static_cast<int>(type)].sum_samples(groups(), items(), partial_.base, total_.base);
    const std::int64_t C = work_.channels, taps = work_.taps;
    const auto write = [&](const Tensor& to, std::int64_t values, std::int64_t first) {
      if (!to.defined()) return;
      depthwise_kernels(dtype_of(to)).from_blocks(C, values, values, block_items(), total_.at(first * work_.lanes),
                                                  to.data_ptr());
    };
    write(to_[1], taps, 0);
    write(to_[2], 1, taps);
  }

 private:
  std::int64_t block_items() const { return (work_.taps + 1) * work_.lanes; }
  std::int64_t items() const { return work_.blocks * block_items(); }

  const Work& work_;
  const Gradients<3>& to_;
  const std::int64_t samples_;  // of a group
  Pointer partial_, total_;
};

// A thread takes some channels of a group of samples: while a band of its rows is in cache, it serves both gradients.
void backward_channels_last(const Work& work, int threads, const Filters& turned, const GradientSums& sums,
                            const FeatureMap* gx) {
  const Convolution& conv = work.conv;
  const FeatureMap &x = work.x, &g = work.y;
  const std::int64_t in_rows = conv.in_rows(), out_rows = conv.out_rows(), groups = sums.groups();
  // As few parts of the channels as keep all threads at work.
  const bool is_even = groups % threads == 0 || groups >= 4 * threads;
  const std::int64_t parts = is_even ? 1 : std::min(work.blocks, ceil_div(4 * threads, groups));
  parallel(threads, [&](Team team) {
    std::vector<ConvolvedRow> met;
    std::vector<const void*> rows_met;
    const auto [begin, end] = team.share(groups * parts);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t group = i / parts, part = i % parts;
      const std::int64_t block = work.blocks * part / parts, blocks = work.blocks * (part + 1) / parts - block;
      const std::int64_t channel = block * work.lanes;
      const std::int64_t channels = std::min(blocks * work.lanes, work.channels - channel);
      const std::int64_t band = rows_of_band(work, channels, x.data.item_bytes);
      if (sums.are_wanted()) sums.clear(group, block, blocks);
      const auto [first, last] = sums.group(group);
      for (std::int64_t n = first; n < last; ++n) {
        const Rows from = rows_of(x, n, channel, conv.width.in), grad = rows_of(g, n, channel, conv.width.out);
        for (std::int64_t row = 0; row < out_rows; row += band) {
          const std::int64_t row_end = std::min(row + band, out_rows);
          if (sums.are_wanted()) {
            add_gradients(work, work.stored, channels, from, grad, row, row_end, sums.of(group, block), sums.has_bias(),
                          rows_met);
          }
          if (!gx) continue;
          const Rows to = rows_of(*gx, n, channel, conv.width.in);
          for (std::int64_t r = row * in_rows / out_rows; r < row_end * in_rows / out_rows; ++r) {
            convolve_back(work, work.stored, turned, block, channels, grad, to, r, met);
          }
        }
      }
    }
  });
}

// A thread takes a block of channels of a group of samples.
void backward_channels_first(const Work& work, int threads, const Filters& turned, const GradientSums& sums,
                             const FeatureMap* gx, const Bands& of_input, const Bands& of_output,
                             const std::vector<Pointer>& memory) {
  const Convolution& conv = work.conv;
  parallel(threads, [&](Team team) {
    std::vector<ConvolvedRow> met;
    std::vector<const void*> rows_met;
    BlockRows x(work, work.x, conv.width.in, memory[2 * team.rank]);
    BlockRows g(work, work.y, conv.width.out, memory[2 * team.rank + 1]);
    const auto [begin, end] = team.share(sums.groups() * work.blocks);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t group = i / work.blocks, block = i % work.blocks;
      if (sums.are_wanted()) sums.clear(group, block, 1);
      const auto [first, last] = sums.group(group);
      for (std::int64_t n = first; n < last; ++n) {
        for (const Band& band : of_output.all) {
          const Rows& from = x.read(n, block, band.other_begin, band.other_end);
          const Rows& grad = g.read(n, block, band.begin, band.end);
          add_gradients(work, work.accumulated, work.lanes, from, grad, band.begin, band.end, sums.of(group, block),
                        sums.has_bias(), rows_met);
        }
        if (!gx) continue;
        BlockRows to(work, *gx, conv.width.in, memory[2 * team.rank]);
        for (const Band& band : of_input.all) {
          const bool is_there = of_output.all.size() == 1;  // all of g
          const Rows& grad = is_there ? g.place(0) : g.read(n, block, band.other_begin, band.other_end);
          const Rows& rows = to.place(band.begin);
          for (std::int64_t row = band.begin; row < band.end; ++row) {
            convolve_back(work, work.accumulated, turned, block, work.lanes, grad, rows, row, met);
          }
          to.write(n, block, band.begin, band.end);
        }
      }
    }
  });
}

void backward(const Work& work, const ops::DepthwiseConv& a, const Gradients<3>& to) {
  const Convolution& conv = work.conv;
  const int threads = work.threads();
  Filters turned(work, a);
  GradientSums sums(work, to);
  Bands of_input, of_output;
  std::int64_t x_items = 0, g_items = 0;  // of a thread
  if (!work.is_channels_last()) {
    const std::int64_t rows = rows_of_band(work, work.lanes, turned.item_bytes());
    if (sums.are_wanted()) conv.for_output_bands(rows, of_output);
    if (to[0].defined()) {
      conv.for_input_bands(ceil_div(rows * conv.in_rows(), std::max<std::int64_t>(1, conv.out_rows())), of_input);
    }
    x_items = std::max(of_input.most_rows, of_output.most_others) * conv.width.in * work.lanes;
    g_items = std::max(of_input.most_others, of_output.most_rows) * conv.width.out * work.lanes;
  }
  Scratch scratch(turned.scratch_items() + sums.scratch_items() + threads * (x_items + g_items),
                  Filters::kPieces + GradientSums::kPieces + 2 * threads, work.x.accumulation_options());
  sums.use(scratch);
  if (to[0].defined()) turned.prepare(scratch, /*turned=*/true);
  std::optional<FeatureMap> gx;
  if (to[0].defined()) gx.emplace(to[0]);
  if (work.is_channels_last()) {
    backward_channels_last(work, threads, turned, sums, gx ? &*gx : nullptr);
  } else {
    std::vector<Pointer> memory;
    for (int t = 0; t < threads; ++t) {
      memory.push_back(scratch.take(x_items));
      memory.push_back(scratch.take(g_items));
    }
    backward_channels_first(work, threads, turned, sums, gx ? &*gx : nullptr, of_input, of_output, memory);
  }
  sums.write();
}

}  // namespace
}  // namespace cpu

template <>
Tensor Backend<Cpu>::depthwise_conv(const ops::DepthwiseConv& a) {
  using namespace cpu;
  const Convolution conv(a);
  if (!has_kernels(conv)) return formula::native_convolution(a);
  Tensor y = empty_map_like(a.input, convolved_sizes(a));
  if (y.numel() > 0) forward(Work(conv, a.input, y), a);
  return y;
}

template <>
Gradients<3> Backend<Cpu>::depthwise_conv_backward(const ops::DepthwiseConvBackward& a) {
  using namespace cpu;
  const ops::DepthwiseConv& f = a.forward;
  const Convolution conv(f);
  if (!has_kernels(conv)) return formula::native_convolution_backward(a);
  const auto to = empty_gradients(f, a.mask);
  if (a.grad_output.numel() == 0) {
    for (const Tensor& gradient : to) {
      if (gradient.defined()) gradient.zero_();
    }
  } else {
    backward(Work(conv, f.input, FeatureMap(f.input).in_my_layout(a.grad_output)), f, to);
  }
  return to;
}

}  // namespace se_ext
