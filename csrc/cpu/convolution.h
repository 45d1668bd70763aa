// Which rows of a map a convolution brings together. A row is what the last spatial dim runs over; rows are counted
// through the other dims of a sample.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../ops/convolution.h"

namespace se_ext::cpu {

// A range of rows of one side, and the range of the other side's rows that they meet.
struct Band {
  std::int64_t begin, end;
  std::int64_t other_begin, other_end;

  std::int64_t rows() const { return end - begin; }
  std::int64_t other_rows() const { return other_end - other_begin; }
};

// Which row of one side a row of the other meets with each row of the filter; -1: none. A table, because it takes
// divisions, and each sample and block of channels asks again.
class RowsMet {
 public:
  RowsMet() = default;
  RowsMet(std::vector<std::int64_t> met, std::int64_t filter_rows) : met_(std::move(met)), filter_rows_(filter_rows) {}

  std::int64_t operator()(std::int64_t row, std::int64_t filter_row) const {
    return met_[row * filter_rows_ + filter_row];
  }

 private:
  std::vector<std::int64_t> met_;
  std::int64_t filter_rows_ = 0;
};

class Convolution {
 public:
  struct Dim {
    std::int64_t in = 1, kernel = 1, out = 1, stride = 1, dilation = 1, begin = 0;

    // The input that output o meets with tap k, and the output that input i goes into with it; -1: none.
    std::int64_t input(std::int64_t o, std::int64_t k) const {
      const std::int64_t i = o * stride - begin + k * dilation;
      return i < in ? std::max<std::int64_t>(i, -1) : -1;
    }
    std::int64_t output(std::int64_t i, std::int64_t k) const {
      const std::int64_t at = i + begin - k * dilation;
      return at < 0 || at % stride != 0 || at / stride >= out ? -1 : at / stride;
    }
  };

  explicit Convolution(const ops::DepthwiseConv& a) {
    const ConvolvedDims dims = convolved_dims(a);
    Dim* const to[3] = {&depth_, &height_, &width};
    for (std::size_t d = 0; d < dims.size(); ++d) {
      const ConvolvedDim& from = dims[d];
      *to[3 - dims.size() + d] = {from.in.expect_int(), from.kernel.expect_int(), from.out.expect_int(), from.stride,
                                  from.dilation,        from.begin.expect_int()};
    }
  }

  Dim width;
  std::int64_t in_rows() const { return depth_.in * height_.in; }
  std::int64_t out_rows() const { return depth_.out * height_.out; }
  std::int64_t filter_rows() const { return depth_.kernel * height_.kernel; }
  std::int64_t taps() const { return filter_rows() * width.kernel; }

  // The rows of the input that the rows of the output read, and the rows of the output that the rows of the input go
  // into.
  RowsMet in_rows_met() const { return rows_met(depth_.out, height_.out, height_.in, &Dim::input); }
  RowsMet out_rows_met() const { return rows_met(depth_.in, height_.in, height_.out, &Dim::output); }

  // All rows in bands of at most `rows`: of the output, beside those of the input that they read; and of the input,
  // beside those of the output that they go into.
  template <class F>
  void for_output_bands(std::int64_t rows, const RowsMet& in_rows, F&& f) const {
    for_bands(out_rows(), rows, in_rows, f);
  }
  template <class F>
  void for_input_bands(std::int64_t rows, const RowsMet& out_rows, F&& f) const {
    for_bands(in_rows(), rows, out_rows, f);
  }

 private:
  template <class F>
  void for_bands(std::int64_t total, std::int64_t rows, const RowsMet& other, F&& f) const {
    for (std::int64_t begin = 0; begin < total; begin += rows) {
      Band band{begin, std::min(begin + rows, total), 0, 0};
      bool is_first = true;
      for (std::int64_t row = band.begin; row < band.end; ++row) {
        for (std::int64_t k = 0; k < filter_rows(); ++k) {
          const std::int64_t met = other(row, k);
          if (met < 0) continue;
          band.other_begin = is_first ? met : std::min(band.other_begin, met);
          band.other_end = is_first ? met + 1 : std::max(band.other_end, met + 1);
          is_first = false;
        }
      }
      f(band);
    }
  }

  // Of `height` rows at each depth, where the other side has `other_height`.
  RowsMet rows_met(std::int64_t depth, std::int64_t height, std::int64_t other_height,
                   std::int64_t (Dim::*other)(std::int64_t, std::int64_t) const) const {
    std::vector<std::int64_t> met;
    met.reserve(depth * height * filter_rows());
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t h = 0; h < height; ++h) {
        for (std::int64_t kd = 0; kd < depth_.kernel; ++kd) {
          for (std::int64_t kh = 0; kh < height_.kernel; ++kh) {
            const std::int64_t at_depth = (depth_.*other)(d, kd), at_height = (height_.*other)(h, kh);
            met.push_back(at_depth < 0 || at_height < 0 ? -1 : at_depth * other_height + at_height);
          }
        }
      }
    }
    return {std::move(met), filter_rows()};
  }

  Dim depth_, height_;
};

}  // namespace se_ext::cpu
