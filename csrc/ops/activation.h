// The activations and gates, one list for both. Torch-free: shared by the op layer and by the kernels of the CPU and of
// CUDA, whose arithmetic is in cpu/kernels/activations.h and cuda/kernels/activations.cuh.
#pragma once

#include <cstdint>

namespace se_ext {

enum class Activation : std::uint8_t {
  Identity,
  Relu,
  Relu6,
  Silu,
  Gelu,
  Hardswish,
  LeakyRelu,
  Tanh,
  Sigmoid,
  Hardsigmoid,
  DoubleSigmoid,
};

// The public names, in the order of the enum.
static constexpr const char* kActivationNames[] = {"identity", "relu",        "relu6",         "silu",
                                                   "gelu",     "hardswish",   "leaky_relu",    "tanh",
                                                   "sigmoid",  "hardsigmoid", "double_sigmoid"};

// Which are allowed as an activation, and which as a gate. The slope of every gate follows from its output, so that
// backward needs the scale alone.
static constexpr Activation kActivations[] = {
    Activation::Identity,  Activation::Relu,      Activation::Relu6, Activation::Silu,    Activation::Gelu,
    Activation::Hardswish, Activation::LeakyRelu, Activation::Tanh,  Activation::Sigmoid,
};
static constexpr Activation kGates[] = {
    Activation::Sigmoid, Activation::Hardsigmoid, Activation::Tanh,
    Activation::Relu,    Activation::Identity,    Activation::DoubleSigmoid,
};

static constexpr double kLeakySlope = 0.01;

// True where the slope follows from the activation's output, so that backward needs no input: y is saved, or s.
static constexpr bool slope_from_output(Activation a) {
  return a != Activation::Silu && a != Activation::Gelu && a != Activation::Hardswish;
}

// A few instructions, so that a pass with it waits for memory alone.
static constexpr bool is_cheap(Activation a) {
  return a == Activation::Identity || a == Activation::Relu || a == Activation::Relu6 || a == Activation::LeakyRelu;
}

}  // namespace se_ext
