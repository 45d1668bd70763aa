// The gradients of a depthwise convolution. The input's is a convolution with the filters turned round. The filters'
// are sums over all points of the batch: of some thousand points, one after the other; of these sums in each group of
// samples, in their order; and then of the groups in theirs. The points and the groups follow from the shape of the
// batch alone, so the sums do not depend on the threads.
#include <optional>
#include <utility>

#include "../formula/convolution.h"
#include "depthwise_conv.h"

namespace se_ext {
namespace cpu {
namespace {

constexpr std::int64_t kMostGroups = 16;  // of samples

// Columns of the input's gradient that are `stride` apart meet the same taps: for them it is a convolution of stride 1
// with these, turned round.
struct Phase {
  int taps;
  std::int64_t tap;      // the first of them in a row of the turned filters
  std::int64_t column;   // of the gradient, the first
  std::int64_t columns;  // in all
  std::int64_t first;    // column of g that the first one meets first
};

std::vector<Phase> phases_of(const Convolution::Dim& w) {
  std::vector<Phase> phases;
  std::int64_t tap = 0;
  for (std::int64_t phase = 0; phase < w.stride; ++phase) {
    const std::int64_t taps = ceil_div(w.kernel - phase, w.stride);
    const std::int64_t column = (phase + w.stride - w.begin % w.stride) % w.stride;
    phases.push_back({static_cast<int>(taps), tap, column, ceil_div(std::max<std::int64_t>(0, w.in - column), w.stride),
                      (column + w.begin - phase) / w.stride - (taps - 1)});
    tap += taps;
  }
  return phases;
}

// The convolution that gives the input's gradient.
struct TurnedConvolution {
  RowsMet out_row;
  std::vector<Phase> phases;
  const Filters& filters;
};

// A row of the input's gradient.
void convolve_back(const Work& work, ConvolveKernel* kernel, const TurnedConvolution& turned, std::int64_t block,
                   std::int64_t channels, const Rows& g, const Rows& gx, std::int64_t row,
                   std::vector<ConvolvedRow>& met) {
  const Convolution& conv = work.conv;
  const Convolution::Dim& w = conv.width;
  for (const Phase& phase : turned.phases) {
    met.clear();
    for (std::int64_t k = 0; k < conv.filter_rows(); ++k) {
      const std::int64_t from = turned.out_row(row, k);
      if (from >= 0) met.push_back({g.row(from), turned.filters.row(block, k, phase.tap)});
    }
    kernel(phase.taps, 1,
           {channels, phase.columns, w.out, phase.first, g.step, w.stride * gx.step, turned.filters.block(), met.data(),
            static_cast<int>(met.size()), /*bias=*/nullptr, gx.point(row, phase.column)});
  }
}

// Adds what rows of g give to the sums of some channels, [filter rows][taps of a row][lanes] and, behind them, the
// bias's [lanes].
void add_gradients(const Work& work, const DepthwiseKernels& kernels, const RowsMet& in_row, std::int64_t channels,
                   const Rows& x, const Rows& g, std::int64_t begin, std::int64_t end, Pointer sums, bool has_bias,
                   std::vector<const void*>& met) {
  const Convolution& conv = work.conv;
  const int taps = static_cast<int>(conv.width.kernel);
  const std::int64_t at_once = kernels.rows_at_once(taps);
  for (std::int64_t k = 0; k < conv.filter_rows(); k += at_once) {
    const std::int64_t rows = std::min(at_once, conv.filter_rows() - k);
    met.clear();
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t from = in_row(row, k + r);
        met.push_back(from >= 0 ? x.row(from) : nullptr);
      }
    }
    kernels.gradient(taps, static_cast<int>(conv.width.stride), static_cast<int>(rows),
                     {channels, conv.width.out, conv.width.in, -conv.width.begin, x.step, g.columns * g.step,
                      (work.taps + 1) * work.lanes, static_cast<int>(end - begin), g.row(begin), met.data(),
                      sums.at(k * taps * work.lanes), has_bias && k == 0 ? sums.at(work.taps * work.lanes) : nullptr});
  }
}

// The sums that are the gradients of filters and biases, of each group of samples by itself and then of all, in the
// order of the samples: [groups][blocks][taps + 1][lanes]. A thread sums up a piece, which is some samples or some rows
// of one, in memory of its own before it adds it to its group's; where a group is one piece, in the group's.
class GradientSums {
 public:
  GradientSums(const Work& work, const Gradients<3>& to)
      : work_(work),
        to_(to),
        samples_(ceil_div(work.x.samples, kMostGroups)),
        piece_samples_(std::max<std::int64_t>(1, kMostSummed / std::max<std::int64_t>(1, work.y.slab.points))),
        piece_rows_(std::max<std::int64_t>(1, kMostSummed / std::max<std::int64_t>(1, work.conv.width.out))),
        in_row_(are_wanted() ? work.conv.in_rows_met() : RowsMet()) {}

  bool are_wanted() const { return to_[1].defined() || to_[2].defined(); }
  bool has_bias() const { return to_[2].defined(); }
  const RowsMet& in_row() const { return in_row_; }
  std::int64_t groups() const { return ceil_div(work_.x.samples, samples_); }
  std::pair<std::int64_t, std::int64_t> group(std::int64_t i) const {
    return {i * samples_, std::min((i + 1) * samples_, work_.x.samples)};
  }
  std::int64_t scratch_items(int threads) const {
    return are_wanted() ? (groups() + 1 + (has_pieces() ? threads : 0)) * items() : 0;
  }
  static constexpr int kPieces = 3;
  void use(Scratch& scratch, int threads) {
    if (!are_wanted()) return;
    partial_ = scratch.take(groups() * items());
    total_ = scratch.take(items());
    piece_ = scratch.take(has_pieces() ? threads * items() : 0);
  }
  // Where a thread sums up a piece of a block.
  Pointer piece(int thread, std::int64_t group, std::int64_t block) const {
    Pointer p = partial_;
    p.base = has_pieces() ? piece_.at(thread * items() + block * block_items()) : of(group, block);
    return p;
  }
  void clear(int thread, std::int64_t group, std::int64_t block, std::int64_t blocks) const {
    const std::int64_t bytes = blocks * block_items() * partial_.item_bytes;
    std::memset(of(group, block), 0, bytes);
    if (has_pieces()) std::memset(piece(thread, group, block).base, 0, bytes);
  }
  // The end of the piece that a row lies in, as far as it is one of rows.
  std::int64_t end_of_piece(std::int64_t row) const { return (row / piece_rows_ + 1) * piece_rows_; }
  // After the rows below `row_end` of a group's i-th sample: adds the piece, if this is its end.
  void finish(int thread, std::int64_t group, std::int64_t block, std::int64_t blocks, std::int64_t i,
              std::int64_t row_end) const {
    if (!has_pieces()) return;
    const auto [first, last] = this->group(group);
    const bool is_whole = row_end == work_.conv.out_rows();
    if (is_whole ? (i + 1) % piece_samples_ != 0 && first + i + 1 < last : row_end % piece_rows_ != 0) return;
    const Pointer from = piece(thread, group, block);
    const std::int64_t values = blocks * block_items();
    const auto& vector = work_.sum_type == DType::Float64 ? kernels().vector_double : kernels().vector_float;
    vector.add_rows(1, values, from.base, of(group, block));
    std::memset(from.base, 0, values * from.item_bytes);
  }
  void write() const {
    if (!are_wanted()) return;
    kernels().dense[static_cast<int>(work_.sum_type)].sum_samples(groups(), items(), partial_.base, total_.base);
    const std::int64_t C = work_.channels, taps = work_.taps;
    const auto write = [&](const Tensor& to, std::int64_t values, std::int64_t first) {
      if (!to.defined()) return;
      depthwise_kernels(dtype_of(to))
          .from_blocks(C, values, values, block_items(), total_.at(first * work_.lanes), to.data_ptr());
    };
    write(to_[1], taps, 0);
    write(to_[2], 1, taps);
  }

 private:
  bool has_pieces() const { return samples_ > piece_samples_ || work_.conv.out_rows() > piece_rows_; }
  std::int64_t block_items() const { return (work_.taps + 1) * work_.lanes; }
  char* of(std::int64_t group, std::int64_t block) const {
    return partial_.at(group * items() + block * block_items());
  }
  std::int64_t items() const { return work_.blocks * block_items(); }

  const Work& work_;
  const Gradients<3>& to_;
  const std::int64_t samples_;        // of a group
  const std::int64_t piece_samples_;  // of a piece, where samples are small
  const std::int64_t piece_rows_;     // of a piece, where they are large
  const RowsMet in_row_;
  Pointer partial_, total_, piece_;
};

// A thread takes some channels of a group of samples: while a band of its rows is in cache, it serves both gradients.
void backward_channels_last(const Work& work, int threads, const TurnedConvolution& turned, const GradientSums& sums,
                            const FeatureMap* gx) {
  const Convolution& conv = work.conv;
  const FeatureMap &x = work.x, &g = work.y;
  const std::int64_t in_rows = conv.in_rows(), out_rows = conv.out_rows(), groups = sums.groups();
  // As few parts of the channels as keep all threads at work.
  const bool is_even = groups % threads == 0 || groups >= 4 * threads;
  const std::int64_t parts = is_even ? 1 : std::min(work.blocks, ceil_div(4 * threads, groups));
  auto met_by = lists<ConvolvedRow>(threads, conv.filter_rows());
  auto rows_met_by = lists<const void*>(threads, conv.out_rows() * conv.filter_rows());
  parallel(threads, [&](Team team) {
    std::vector<ConvolvedRow> met = std::move(met_by[team.rank]);
    std::vector<const void*> rows_met = std::move(rows_met_by[team.rank]);
    const auto [begin, end] = team.share(groups * parts);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t group = i / parts, part = i % parts;
      const std::int64_t block = work.blocks * part / parts, blocks = work.blocks * (part + 1) / parts - block;
      const std::int64_t channel = block * work.lanes;
      const std::int64_t channels = std::min(blocks * work.lanes, work.channels - channel);
      const std::int64_t band = rows_of_band(work, channels, x.data.item_bytes);
      if (sums.are_wanted()) sums.clear(team.rank, group, block, blocks);
      const auto [first, last] = sums.group(group);
      for (std::int64_t n = first; n < last; ++n) {
        const Rows from = rows_of(x, n, channel, conv.width.in), grad = rows_of(g, n, channel, conv.width.out);
        for (std::int64_t row = 0, row_end = 0; row < out_rows; row = row_end) {
          row_end = std::min({row + band, out_rows, sums.end_of_piece(row)});
          if (sums.are_wanted()) {
            add_gradients(work, work.stored, sums.in_row(), channels, from, grad, row, row_end,
                          sums.piece(team.rank, group, block), sums.has_bias(), rows_met);
            sums.finish(team.rank, group, block, blocks, n - first, row_end);
          }
          if (!gx) continue;
          const Rows to = rows_of(*gx, n, channel, conv.width.in);
          for (std::int64_t r = row * in_rows / out_rows; r < row_end * in_rows / out_rows; ++r) {
            convolve_back(work, work.stored.convolve, turned, block, channels, grad, to, r, met);
          }
        }
      }
    }
  });
}

// A thread takes a block of channels of a group of samples.
void backward_channels_first(const Work& work, int threads, const TurnedConvolution& turned, const GradientSums& sums,
                             const FeatureMap* gx, const Bands& of_input, const Bands& of_output,
                             const std::vector<Pointer>& memory) {
  const Convolution& conv = work.conv;
  auto met_by = lists<ConvolvedRow>(threads, conv.filter_rows());
  auto rows_met_by = lists<const void*>(threads, conv.out_rows() * conv.filter_rows());
  parallel(threads, [&](Team team) {
    std::vector<ConvolvedRow> met = std::move(met_by[team.rank]);
    std::vector<const void*> rows_met = std::move(rows_met_by[team.rank]);
    BlockRows x(work, work.x, conv.width.in, memory[2 * team.rank]);
    BlockRows g(work, work.y, conv.width.out, memory[2 * team.rank + 1]);
    const auto [begin, end] = team.share(sums.groups() * work.blocks);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t group = i / work.blocks, block = i % work.blocks;
      if (sums.are_wanted()) sums.clear(team.rank, group, block, 1);
      const auto [first, last] = sums.group(group);
      for (std::int64_t n = first; n < last; ++n) {
        for (const Band& band : of_output.all) {
          const Rows& from = x.read(n, block, band.other_begin, band.other_end);
          const Rows& grad = g.read(n, block, band.begin, band.end);
          for (std::int64_t row = band.begin, row_end = 0; row < band.end; row = row_end) {
            row_end = std::min(band.end, sums.end_of_piece(row));
            add_gradients(work, work.accumulated, sums.in_row(), work.lanes, from, grad, row, row_end,
                          sums.piece(team.rank, group, block), sums.has_bias(), rows_met);
            sums.finish(team.rank, group, block, 1, n - first, row_end);
          }
        }
        if (!gx) continue;
        BlockRows to(work, *gx, conv.width.in, memory[2 * team.rank]);
        for (const Band& band : of_input.all) {
          const bool is_there = of_output.all.size() == 1;  // all of g
          const Rows& grad = is_there ? g.place(0) : g.read(n, block, band.other_begin, band.other_end);
          const Rows& rows = to.place(band.begin);
          for (std::int64_t row = band.begin; row < band.end; ++row) {
            convolve_back(work, work.accumulated.convolve_block, turned, block, work.lanes, grad, rows, row, met);
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
  Filters filters(work, a);
  const TurnedConvolution turned{to[0].defined() ? conv.out_rows_met() : RowsMet(), phases_of(conv.width), filters};
  GradientSums sums(work, to);
  Bands of_input, of_output;
  std::int64_t x_items = 0, g_items = 0;  // of a thread
  if (!work.is_channels_last()) {
    const std::int64_t rows = rows_of_band(work, work.lanes, work.sum_bytes());
    if (sums.are_wanted()) conv.for_output_bands(rows, sums.in_row(), of_output);
    if (to[0].defined()) {
      conv.for_input_bands(ceil_div(rows * conv.in_rows(), std::max<std::int64_t>(1, conv.out_rows())), turned.out_row,
                           of_input);
    }
    x_items = std::max(of_input.most_rows, of_output.most_others) * conv.width.in * work.lanes;
    g_items = std::max(of_input.most_others, of_output.most_rows) * conv.width.out * work.lanes;
  }
  Scratch scratch(filters.scratch_items() + sums.scratch_items(threads) + threads * (x_items + g_items),
                  Filters::kPieces + GradientSums::kPieces + 2 * threads, work.x.accumulation_options());
  sums.use(scratch, threads);
  if (to[0].defined()) filters.prepare(scratch, /*turned=*/true);
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
Gradients<3> Backend<Cpu>::depthwise_conv_backward(const ops::DepthwiseConvBackward& a) {
  using namespace cpu;
  const ops::DepthwiseConv& f = a.forward;
  const Convolution conv(f);
  if (!has_kernels(conv)) return formula::native_convolution_backward(a);
  const auto to = empty_gradients(f, a.mask);
  backward(Work(conv, f.input, FeatureMap(f.input).in_my_layout(a.grad_output)), f, to);
  return to;
}

}  // namespace se_ext
