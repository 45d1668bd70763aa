// Every op of the library under ThreadSanitizer, in a program of its own: called from several threads at once, then on
// teams of two to four threads, which must give the bits of one thread. threads [--without-barriers]
//
// Torch itself is not compiled with the sanitizer. No list of suppressions is needed: torch's locks and allocations are
// seen, and where its own threads would copy memory, it gets one thread.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "openmp.h"

namespace {

using at::Tensor;
using c10::IValue;

constexpr int kHostThreads = 4;
constexpr const char* kNamespace = "se_ext::";

struct Problem {
  std::vector<std::int64_t> shape;  // of maps, [N, C, *spatial]
  std::int64_t hidden;
  at::ScalarType dtype;
  bool channels_last;
  const char *pre, *post;
};

// Large enough for four threads. Samples in abundance, too few of them for a thread each, one sample, a sequence and a
// volume; 1024 channels make the excitation a team's work.
const struct {
  std::vector<std::int64_t> shape;
  std::int64_t hidden;
} kShapes[] = {
    {{16, 32, 14, 14}, 8}, {{3, 40, 31, 33}, 5}, {{1, 1024, 7, 7}, 64}, {{5, 33, 400}, 7}, {{2, 24, 5, 18, 17}, 6}};

std::vector<Problem> problems() {
  std::vector<Problem> all;
  for (const auto& [shape, hidden] : kShapes) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (const bool channels_last : {false, true}) {
        if (channels_last && shape.size() == 3) continue;
        all.push_back({shape, hidden, dtype, channels_last, "identity", "relu"});
        all.push_back({shape, hidden, dtype, channels_last, "silu", "silu"});
      }
    }
  }
  return all;
}

// ---- an op's arguments, by their names in its schema ----

bool is_depthwise(const c10::OperatorName& op) {
  return op.name.find("depthwise") != std::string::npos;
}

Tensor make_map(const Problem& p) {
  const Tensor map = at::randn(p.shape).to(p.dtype);
  if (!p.channels_last) return map;
  return map.contiguous(p.shape.size() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
}

IValue make_argument(const c10::OperatorName& op, const std::string& name, const Problem& p) {
  const std::int64_t N = p.shape[0], C = p.shape[1], M = p.hidden;
  const auto random = [&](at::IntArrayRef shape) { return at::randn(shape).to(p.dtype); };
  if (is_depthwise(op)) {
    std::vector<std::int64_t> filters{C, 1};
    filters.resize(p.shape.size(), 3);
    if (name == "weight") return random(filters) / 3;
    if (name == "padding") return std::vector<std::int64_t>();  // "same"
    if (name == "stride" || name == "dilation") return std::vector<std::int64_t>{1};
  }
  if (name == "input" || name == "residual") return make_map(p);
  if (name == "z" || name == "scale") return random({N, C});
  if (name == "w1") return random({M, C}) / std::sqrt(C);
  if (name == "b1") return random({M});
  if (name == "w2") return random({C, M}) / std::sqrt(M);
  if (name == "b2" || name == "bias" || name == "bn_bias" || name == "running_mean") return random({C});
  if (name == "weight" || name == "bn_weight") return random({C});
  if (name == "running_var") return random({C}).abs() + 1;
  if (name == "num_batches_tracked") return at::tensor(std::int64_t{3});
  if (name == "drop_scale") return (at::arange(N) % 3 > 0).to(p.dtype) * 1.25;
  if (name == "batch_statistics" || name == "training") return true;
  if (name == "momentum") return 0.1;
  if (name == "eps") return 1e-5;
  if (name == "pre_activation") return p.pre;
  if (name == "post_activation") return p.post;
  if (name == "activation") return "relu";
  if (name == "gate") return "sigmoid";
  throw std::runtime_error(op.name + ": nothing is known of the argument " + name);
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

struct Call {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;  // several threads read them at once
  Tensor grad;                    // dL/dy; undefined: the op is not differentiated

  std::string name() const { return op.operator_name().name; }
};

std::vector<c10::OperatorHandle> all_ops() {
  std::vector<c10::OperatorHandle> ops;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind(kNamespace, 0) == 0)
      ops.push_back(c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str()));
  }
  return ops;
}

// One call of every op but the backward ops, which autograd calls. Made on one thread: ThreadSanitizer does not see how
// torch's own threads wait for each other.
std::vector<Call> make_calls(const Problem& p) {
  at::set_num_threads(1);
  std::vector<Call> calls;
  for (const c10::OperatorHandle& op : all_ops()) {
    const c10::OperatorName& name = op.operator_name();
    if (ends_with(name.name, "_backward")) continue;
    Call call{op, {}, {}};
    for (const c10::Argument& argument : op.schema().arguments()) {
      call.arguments.push_back(make_argument(name, argument.name(), p));
    }
    // Ops in place and forward ops have no gradient.
    if (!ends_with(name.name, "_") && !ends_with(name.name, "_forward")) {
      const bool of_rows = ends_with(name.name, "::squeeze") || ends_with(name.name, "::excite");
      call.grad = of_rows ? at::randn({p.shape[0], p.shape[1]}).to(p.dtype) : make_map(p);
    }
    calls.push_back(std::move(call));
  }
  return calls;
}

bool has_gradient(const std::string& argument) {
  return argument.rfind("running_", 0) != 0 && argument != "drop_scale";
}

// Outputs, gradients, and what the op writes.
std::vector<Tensor> run(const Call& call) {
  const c10::AutoGradMode recording(call.grad.defined());
  std::vector<Tensor> leaves, found;
  std::vector<IValue> stack;
  for (std::size_t i = 0; i < call.arguments.size(); ++i) {
    const c10::Argument& argument = call.op.schema().arguments()[i];
    IValue value = call.arguments[i];
    if (value.isTensor() && argument.alias_info() && argument.alias_info()->isWrite()) {
      found.push_back(value.toTensor().clone());
      value = found.back();
    } else if (value.isTensor() && call.grad.defined() && value.toTensor().is_floating_point() &&
               has_gradient(argument.name())) {
      leaves.push_back(value.toTensor().detach().requires_grad_());
      value = leaves.back();
    }
    stack.push_back(std::move(value));
  }
  call.op.callBoxed(stack);
  if (call.grad.defined()) {
    for (const Tensor& gradient : torch::autograd::grad({stack.front().toTensor()}, leaves, {call.grad})) {
      found.push_back(gradient);
    }
  }
  for (const IValue& value : stack) {
    if (value.isTensor() && value.toTensor().defined()) found.push_back(value.toTensor().detach());
  }
  return found;
}

// ---- what is looked at ----

int failures = 0;

void fail(const std::string& what) {
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

bool same_bits(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!at::equal(a[i], b[i])) return false;
  }
  return true;
}

// The first calls of the process come from several threads at once, on the same arguments: what is made at a first call
// and what a thread keeps must not be shared in a way that races. Each thread begins with another op.
void host_threads(const std::vector<Problem>& all) {
  std::vector<Call> calls;
  for (std::size_t i = 0; i < all.size(); i += 3) {
    for (Call& call : make_calls(all[i])) calls.push_back(std::move(call));
  }
  at::set_num_threads(2);
  std::vector<std::vector<std::vector<Tensor>>> found(kHostThreads);
  std::vector<std::exception_ptr> errors(kHostThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kHostThreads; ++t) {
    threads.emplace_back([&, t] {
      try {
        found[t].resize(calls.size());
        for (std::size_t i = 0; i < calls.size(); ++i) {
          const std::size_t at = (i + t) % calls.size();
          found[t][at] = run(calls[at]);
        }
      } catch (...) {
        errors[t] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (int t = 1; t < kHostThreads; ++t) {
    for (std::size_t i = 0; i < calls.size(); ++i) {
      if (!same_bits(found[0][i], found[t][i])) fail(calls[i].name() + ": two threads at once gave different bits");
    }
  }
}

std::mutex called_mutex;
std::set<std::string> called;

std::unique_ptr<at::ObserverContext> note(const at::RecordFunction& function) {
  const std::lock_guard lock(called_mutex);
  called.insert(function.name());
  return nullptr;
}

// Each op alone: as many teams as there are problems, of two to four threads in turn.
void teams(const std::vector<Problem>& all) {
  std::map<std::string, int> in_teams;
  const auto handle = at::addGlobalCallback(at::RecordFunctionCallback(note).scopes({at::RecordScope::FUNCTION}));
  int threads = 2;
  for (const Problem& p : all) {
    for (const Call& call : make_calls(p)) {
      at::set_num_threads(1);
      const auto expected = run(call);
      at::set_num_threads(threads);
      const int before = openmp::teams;
      if (!same_bits(run(call), expected)) {
        fail(call.name() + ": other bits with " + std::to_string(threads) + " threads");
      }
      in_teams[call.name()] += openmp::teams - before;
    }
    threads = threads == 4 ? 2 : threads + 1;
  }
  at::removeCallback(handle);
  for (const c10::OperatorHandle& op : all_ops()) {
    const std::string& name = op.operator_name().name;
    if (called.count(name) == 0) fail(name + " was never called");
    if (!ends_with(name, "_backward") && in_teams[name] == 0) fail(name + " never ran on several threads");
  }
}

// A team whose barriers do nothing: ThreadSanitizer must report a race.
void without_barriers() {
  const auto calls = make_calls({{1, 1024, 7, 7}, 64, at::kFloat, false, "identity", "relu"});
  openmp::barriers_are_left_out = true;
  at::set_num_threads(4);
  for (const Call& call : calls) {
    if (ends_with(call.name(), "::squeeze_excite")) run(call);
  }
}

}  // namespace

int main(int count, char** arguments) {
  at::manual_seed(1);
  try {
    if (count == 2 && arguments[1] == std::string_view("--without-barriers")) {
      without_barriers();
    } else if (count == 1) {
      host_threads(problems());
      teams(problems());
      std::printf("%zu ops, %d teams, %d failures\n", all_ops().size(), openmp::teams.load(), failures);
    } else {
      std::fprintf(stderr, "usage: threads [--without-barriers]\n");
      return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return failures > 0;
}
