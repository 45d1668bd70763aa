#include "photograph.h"

#include <ATen/ATen.h>
#include <jpeglib.h>  // needs what <cstdio> declares

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>

at::Tensor read_photograph(const std::string& file) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> stream(std::fopen(file.c_str(), "rb"), std::fclose);
  if (!stream) throw std::runtime_error("cannot open the photograph " + file);

  jpeg_decompress_struct jpeg;
  jpeg_error_mgr errors;
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_decompress(&jpeg);
  jpeg_stdio_src(&jpeg, stream.get());
  jpeg_read_header(&jpeg, TRUE);
  jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&jpeg);

  at::Tensor pixels = at::empty({jpeg.output_height, jpeg.output_width, 3}, at::kByte);
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW row = pixels[jpeg.output_scanline].data_ptr<std::uint8_t>();
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  return pixels;
}

at::Tensor preprocess(const at::Tensor& photograph) {
  constexpr std::int64_t kResized = 256, kCropped = 224;
  const std::int64_t height = photograph.size(0), width = photograph.size(1);
  const std::int64_t shorter = std::min(height, width);
  const std::int64_t resized_height = kResized * height / shorter, resized_width = kResized * width / shorter;

  at::Tensor image = photograph.permute({2, 0, 1}).unsqueeze(0).to(at::kFloat).contiguous();
  image = at::_upsample_bilinear2d_aa(image, {resized_height, resized_width}, /*align_corners=*/false);
  image = image.narrow(2, (resized_height - kCropped) / 2, kCropped);
  image = image.narrow(3, (resized_width - kCropped) / 2, kCropped);

  const at::Tensor mean = at::tensor({0.485f, 0.456f, 0.406f}).view({1, 3, 1, 1});
  const at::Tensor deviation = at::tensor({0.229f, 0.224f, 0.225f}).view({1, 3, 1, 1});
  return ((image / 255 - mean) / deviation).contiguous();
}
