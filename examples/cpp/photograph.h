// From a JPEG file to the input of a network, in two steps; prepare.py has the second in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// [H, W, 3], uint8: red, green and blue. libjpeg ends the program, with a message, where the file is no JPEG.
at::Tensor read_photograph(const std::string& file);

// [H, W, 3], uint8 -> [1, 3, 224, 224], float32. The shorter side is resized to 256 (bilinear, antialiased; the longer
// side in proportion, rounded down), the middle 224 × 224 are cut out, and each colour is normalised with ImageNet's
// mean and standard deviation.
at::Tensor preprocess(const at::Tensor& photograph);
