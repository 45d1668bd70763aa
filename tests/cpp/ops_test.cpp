// What the ops promise, tried in a C++ program that is linked with the library: ops_test CASE. A case that fails
// throws, and the program ends with 1 and a message.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../../csrc/info.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, const OptionalTensor& residual, std::string_view post_activation) {
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                           std::string_view, std::string_view, const OptionalTensor&, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("se_ext::squeeze_excite", "").typed<Signature>();
  return op.call(input, w1, b1, w2, b2, "relu", "sigmoid", residual, post_activation);
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, const OptionalTensor& residual, std::string_view post_activation) {
  using Signature = void(Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                         std::string_view, std::string_view, const OptionalTensor&, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("se_ext::squeeze_excite_", "").typed<Signature>();
  op.call(input, w1, b1, w2, b2, "relu", "sigmoid", residual, post_activation);
}

// relu(s ⊙ x + r) with s = sigmoid(W2 relu(W1 mean(x) + b1) + b2), x [N, C, H, W], in the dtype of its arguments.
Tensor formula(const std::vector<Tensor>& t) {
  const Tensor z = t[0].mean({2, 3});
  const Tensor hidden = at::relu(at::linear(z, t[1], t[2]));
  const Tensor scale = at::sigmoid(at::linear(hidden, t[3], t[4]));
  return at::relu(scale.unsqueeze(-1).unsqueeze(-1) * t[0] + t[5]);
}

Tensor fused(const std::vector<Tensor>& t) {
  return squeeze_excite(t[0], t[1], t[2], t[3], t[4], t[5], "relu");
}

// x, w1, b1, w2, b2 and r; the map in NCHW or channels_last.
std::vector<Tensor> make_arguments(at::ScalarType dtype, at::MemoryFormat format, std::int64_t h = 7) {
  at::manual_seed(1);
  constexpr std::int64_t n = 3, c = 37, m = 5, w = 9;
  std::vector<Tensor> made{at::randn({n, c, h, w}), at::randn({m, c}), at::randn({m}),
                           at::randn({c, m}),       at::randn({c}),    at::randn({n, c, h, w})};
  for (Tensor& t : made) t = t.to(dtype);
  for (Tensor* map : {&made.front(), &made.back()}) *map = map->contiguous(format);
  return made;
}

std::vector<Tensor> in_float64(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> made;
  for (const Tensor& t : tensors) made.push_back(t.to(at::kDouble));
  return made;
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// The error relative to the largest magnitude, against a multiple of the dtype's eps as in tests/helpers.py.
void expect_close(const std::string& name, const Tensor& ours, const Tensor& exact) {
  const double eps = ours.scalar_type() == at::kBFloat16 ? 0x1p-7
                     : ours.scalar_type() == at::kFloat  ? 0x1p-23
                                                         : 0x1p-52;
  const double error = ((ours.to(at::kDouble) - exact).abs().max() / exact.abs().max()).item<double>();
  expect(ours.sizes() == exact.sizes() && error < 100 * eps, name + ": off by " + std::to_string(error / eps) + " eps");
}

void values() {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
      const auto arguments = make_arguments(dtype, format);
      const Tensor y = fused(arguments);
      expect(y.is_contiguous(format), "the output has another memory format");
      expect_close("output", y, formula(in_float64(arguments)));
    }
  }
}

void in_place() {
  auto t = make_arguments(at::kFloat, at::MemoryFormat::ChannelsLast);
  const Tensor expected = fused(t);
  const void* memory = t[0].data_ptr();
  squeeze_excite_(t[0], t[1], t[2], t[3], t[4], t[5], "relu");
  expect(t[0].data_ptr() == memory && at::equal(t[0], expected), "in place is not what the functional op gives");
}

void error() {
  auto t = make_arguments(at::kFloat, at::MemoryFormat::Contiguous);
  std::string said = "nothing";
  try {
    squeeze_excite(t[0], t[1], t[2], t[3].t().contiguous(), t[4], t[5], "relu");
  } catch (const c10::Error& e) {
    said = e.what_without_backtrace();
  }
  expect(said == "squeeze_excite: expected w2 of shape [37, 5] or [37, 5, 1, 1], got [5, 37]", "it said: " + said);
}

// Of sum(y²).
std::vector<Tensor> gradients(std::vector<Tensor> tensors, Tensor (*block)(const std::vector<Tensor>&)) {
  const c10::AutoGradMode recording(true);
  for (Tensor& t : tensors) t = t.detach().requires_grad_();
  return torch::autograd::grad({block(tensors).square().sum()}, tensors);
}

void backward() {
  const auto arguments = make_arguments(at::kFloat, at::MemoryFormat::ChannelsLast);
  const auto ours = gradients(arguments, fused);
  const auto exact = gradients(in_float64(arguments), formula);
  const char* names[] = {"x", "w1", "b1", "w2", "b2", "residual"};
  for (std::size_t i = 0; i < ours.size(); ++i) expect_close(names[i], ours[i], exact[i]);
}

// Maps that are large enough to wake a second thread.
std::vector<Tensor> large_arguments() {
  return make_arguments(at::kFloat, at::MemoryFormat::Contiguous, 200);
}

void threads() {
  const auto arguments = large_arguments();
  at::set_num_threads(1);
  const Tensor y = fused(arguments);
  const auto one = gradients(arguments, fused);
  at::set_num_threads(2);
  expect(at::get_num_threads() == 2 && at::equal(y, fused(arguments)), "another output with two threads");
  const auto two = gradients(arguments, fused);
  for (std::size_t i = 0; i < one.size(); ++i) expect(at::equal(one[i], two[i]), "another gradient with two threads");
}

// An op inside of a parallel region runs on the thread that calls it, and gives the same bits.
void nested() {
  const auto arguments = large_arguments();
  at::set_num_threads(2);
  const Tensor y = fused(arguments);
  const auto expected = gradients(arguments, fused);
  constexpr std::int64_t kCalls = 6;
  std::vector<Tensor> outputs(kCalls);
  std::vector<std::vector<Tensor>> found(kCalls);
  std::atomic<int> inside{0};
  // torch opens the region. This program is built without OpenMP, so that at::parallel_for would be a plain loop in it.
  Tensor numbers = at::arange(kCalls, at::kLong);
  auto elements = at::TensorIterator::nullary_op(numbers);
  elements.for_each(
      [&](char** data, const std::int64_t* strides, std::int64_t size) {
        for (std::int64_t k = 0; k < size; ++k) {
          const std::int64_t i = *reinterpret_cast<const std::int64_t*>(data[0] + k * strides[0]);
          inside += at::in_parallel_region();
          outputs[i] = fused(arguments);
          found[i] = gradients(arguments, fused);
        }
      },
      /*grain_size=*/1);
  expect(inside == kCalls, "the calls were not inside of a parallel region");
  for (std::int64_t i = 0; i < kCalls; ++i) {
    expect(at::equal(outputs[i], y), "another output inside of a parallel region");
    for (std::size_t k = 0; k < expected.size(); ++k) {
      expect(at::equal(found[i][k], expected[k]), "another gradient inside of a parallel region");
    }
  }
}

void openmp() {
  at::set_num_threads(2);
  fused(large_arguments());
  std::set<std::string> runtimes;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    for (const char* name : {"/libgomp", "/libomp", "/libiomp5"}) {
      if (line.find(name) != std::string::npos) runtimes.insert(line.substr(line.find('/')));
    }
  }
  expect(runtimes.size() == 1, std::to_string(runtimes.size()) + " OpenMP runtimes in the process");
  expect(runtimes.count(se_ext::openmp_runtime()) == 1, "the library is served by " + se_ext::openmp_runtime());
}

// Those that the build was asked for and this CPU can run; and the widest of them is used.
void instruction_sets() {
  const char* names = std::getenv("BUILT");
  expect(names, "BUILT says which instruction sets were built; ctest sets it");
  std::istringstream built(names);
  const std::set<std::string> asked{std::istream_iterator<std::string>(built), {}};
  const auto found = se_ext::cpu_capabilities();
  for (const std::string& name : found) expect(asked.count(name) == 1, name + " was not asked for");
  expect(found.front() == "baseline" && found.back() == se_ext::cpu_capability(),
         "in use: " + se_ext::cpu_capability());
}

const std::map<std::string, std::function<void()>> kCases{
    {"values", values},   {"in_place", in_place}, {"error", error},   {"backward", backward},
    {"threads", threads}, {"nested", nested},     {"openmp", openmp}, {"instruction_sets", instruction_sets},
};

}  // namespace

int main(int count, char** arguments) {
  const auto found = kCases.find(count == 2 ? arguments[1] : "");
  if (found == kCases.end()) {
    std::fprintf(stderr, "usage: ops_test CASE, where tests/cpp/CMakeLists.txt lists the cases\n");
    return 2;
  }
  try {
    found->second();
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
  }
}
