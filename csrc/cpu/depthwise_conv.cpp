#include "depthwise_conv.h"

#include "../formula/convolution.h"

namespace se_ext {
namespace cpu {
namespace {

// A row of the output, of some channels from those of `block` on.
void convolve(const Work& work, ConvolveKernel* kernel, const RowsMet& in_row, const Filters& filters,
              std::int64_t block, std::int64_t channels, const Rows& x, const Rows& y, std::int64_t row,
              std::vector<ConvolvedRow>& met) {
  const Convolution& conv = work.conv;
  met.clear();
  for (std::int64_t k = 0; k < conv.filter_rows(); ++k) {
    const std::int64_t from = in_row(row, k);
    if (from >= 0) met.push_back({x.row(from), filters.row(block, k)});
  }
  kernel(static_cast<int>(conv.width.kernel), static_cast<int>(conv.width.stride),
         {channels, conv.width.out, conv.width.in, -conv.width.begin, x.step, y.step, filters.block(), met.data(),
          static_cast<int>(met.size()), filters.bias(block), y.row(row)});
}

void forward(const Work& work, const ops::DepthwiseConv& a) {
  const Convolution& conv = work.conv;
  const FeatureMap &x = work.x, &y = work.y;
  const std::int64_t N = x.samples, out_rows = conv.out_rows();
  const int threads = work.threads();
  const RowsMet in_row = conv.in_rows_met();
  Filters filters(work, a);
  Bands bands;
  std::int64_t x_items = 0, y_items = 0;  // of a thread
  if (!work.is_channels_last()) {
    conv.for_output_bands(rows_of_band(work, work.lanes, work.sum_bytes()), in_row, bands);
    x_items = bands.most_others * conv.width.in * work.lanes;
    y_items = bands.most_rows * conv.width.out * work.lanes;
  }
  Scratch scratch(filters.scratch_items() + threads * (x_items + y_items), Filters::kPieces + 2 * threads,
                  x.accumulation_options());
  filters.prepare(scratch, /*turned=*/false);
  auto met_by = lists<ConvolvedRow>(threads, conv.filter_rows());

  if (work.is_channels_last()) {
    parallel(threads, [&](Team team) {
      std::vector<ConvolvedRow> met = std::move(met_by[team.rank]);
      const auto [begin, end] = team.share(N * out_rows);
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t n = i / out_rows;
        convolve(work, work.stored.convolve, in_row, filters, /*block=*/0, work.channels,
                 rows_of(x, n, 0, conv.width.in), rows_of(y, n, 0, conv.width.out), i % out_rows, met);
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
    std::vector<ConvolvedRow> met = std::move(met_by[team.rank]);
    BlockRows from(work, x, conv.width.in, x_at[team.rank]), to(work, y, conv.width.out, y_at[team.rank]);
    const auto [begin, end] = team.share(N * work.blocks);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t n = i / work.blocks, block = i % work.blocks;
      for (const Band& band : bands.all) {
        const Rows& in = from.read(n, block, band.other_begin, band.other_end);
        const Rows& out = to.place(band.begin);
        for (std::int64_t row = band.begin; row < band.end; ++row) {
          convolve(work, work.accumulated.convolve_block, in_row, filters, block, work.lanes, in, out, row, met);
        }
        to.write(n, block, band.begin, band.end);
      }
    }
  });
}

}  // namespace
}  // namespace cpu

template <>
Tensor Backend<Cpu>::depthwise_conv(const ops::DepthwiseConv& a) {
  using namespace cpu;
  const Convolution conv(a);
  if (!has_kernels(conv)) return formula::native_convolution(a);
  Tensor y = empty_convolved(a);
  forward(Work(conv, a.input, y), a);
  return y;
}

}  // namespace se_ext
