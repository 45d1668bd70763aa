// A TorchScript file in a C++ program, as it was saved, frozen, and optimised for inference: script_test FILE CHANNELS.
#include <torch/script.h>

#include <cstdio>
#include <stdexcept>
#include <string>

namespace {

void expect_close(const std::string& what, const at::Tensor& y, const at::Tensor& expected) {
  const double error = ((y - expected).abs().max() / expected.abs().max()).item<double>();
  if (!(error < 1e-5)) throw std::runtime_error(what + ": off by " + std::to_string(error));
}

at::Tensor run(torch::jit::Module& module, const at::Tensor& x) {
  for (int i = 0; i < 3; ++i) module.forward({x});  // TorchScript rewrites the graph in the first runs
  return module.forward({x}).toTensor();
}

void check(const std::string& file, std::int64_t channels) {
  const c10::InferenceMode no_gradients;
  at::manual_seed(1);
  const at::Tensor x = at::randn({2, channels, 64, 64});
  torch::jit::Module saved = torch::jit::load(file);
  saved.eval();
  const at::Tensor expected = run(saved, x);

  torch::jit::Module frozen = torch::jit::freeze(saved.clone());
  expect_close("frozen", run(frozen, x), expected);
  frozen.save(file + ".frozen");
  torch::jit::Module loaded = torch::jit::load(file + ".frozen");
  expect_close("frozen, saved and loaded", run(loaded, x), expected);

  torch::jit::Module copy = saved.clone();
  torch::jit::Module optimized = torch::jit::optimize_for_inference(copy);
  expect_close("optimised for inference", run(optimized, x), expected);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 3) throw std::runtime_error("usage: script_test FILE CHANNELS");
    check(arguments[1], std::stoll(arguments[2]));
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
  }
}
