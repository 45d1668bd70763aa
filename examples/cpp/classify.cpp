// classify MODEL PHOTOGRAPH [LOGITS]: the five likeliest classes of a JPEG photograph, and the time of the network.
//
// MODEL is a TorchScript file (.pt) or a package of AOTInductor (.pt2); prepare.py writes one of each. All logits are
// written to the file LOGITS, one a line.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iomanip>
#include <memory>
#include <string>
#include <vector>

#include "photograph.h"

using Network = std::function<at::Tensor(const at::Tensor&)>;  // [N, 3, H, W] -> [N, classes]

Network load(const std::string& file) {
  if (file.ends_with(".pt2")) {
    auto package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(file);
    return [package](const at::Tensor& image) { return package->run({image}).at(0); };
  }
  auto script = std::make_shared<torch::jit::Module>(torch::jit::load(file));
  return [script](const at::Tensor& image) { return script->forward({image}).toTensor(); };
}

double median_milliseconds(const Network& network, const at::Tensor& image) {
  constexpr int kRuns = 11;
  std::vector<double> times;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    network(image);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[kRuns / 2];
}

void write_logits(const at::Tensor& logits, const std::string& file) {
  std::ofstream out(file);
  out << std::setprecision(9);
  for (std::int64_t i = 0; i < logits.size(0); ++i) out << logits[i].item<float>() << '\n';
}

void classify(const std::string& model, const std::string& photograph, const std::string& logits_file) {
  const c10::InferenceMode no_gradients;
  const Network network = load(model);
  const at::Tensor image = preprocess(read_photograph(photograph));
  for (int run = 0; run < 3; ++run) network(image);  // TorchScript compiles in its first runs

  const at::Tensor logits = network(image)[0];
  const auto [probabilities, classes] = logits.softmax(0).topk(5);
  for (std::int64_t i = 0; i < 5; ++i) {
    const auto number = static_cast<long long>(classes[i].item<std::int64_t>());
    std::printf("class %3lld  %6.2f %%\n", number, 100 * probabilities[i].item<double>());
  }
  std::printf("%.1f ms an image\n", median_milliseconds(network, image));
  if (!logits_file.empty()) write_logits(logits, logits_file);
}

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::fprintf(stderr, "usage: classify MODEL PHOTOGRAPH [LOGITS]\n");
    return 2;
  }
  try {
    classify(arguments[1], arguments[2], count == 4 ? arguments[3] : "");
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
