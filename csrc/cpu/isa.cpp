#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "../info.h"

namespace se_ext::cpu {
namespace {

struct Capability {
  const char* name;
  bool (*supported)();
  const KernelTable& (*table)();
  const DepthwiseTable& (*depthwise_table)();
};

bool always() {
  return true;
}

// Those of csrc/instruction_sets.txt. A build by CMake may leave out all but the baseline.
const Capability kCapabilities[] = {
    {"baseline", always, baseline::table, baseline::depthwise_table},
#if defined(__x86_64__) && !defined(SE_EXT_WITHOUT_AVX2)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     avx2::table, avx2::depthwise_table},
#endif
#if defined(__x86_64__) && !defined(SE_EXT_WITHOUT_AVX512)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     avx512::table, avx512::depthwise_table},
#endif
};

const Capability& choose() {
  const char* forced = std::getenv("SE_EXT_CPU_ISA");
  const Capability* widest = nullptr;
  std::string known;
  for (const Capability& c : kCapabilities) {
    if (forced && std::string_view(forced) == c.name) {
      TORCH_CHECK(c.supported(), "SE_EXT_CPU_ISA: this CPU can't run ", forced);
      return c;
    }
    if (c.supported()) widest = &c;
    known += (known.empty() ? "" : ", ") + std::string(c.name);
  }
  TORCH_CHECK_VALUE(!forced, "SE_EXT_CPU_ISA: expected one of ", known, ", got \"", forced, "\"");
  return *widest;
}

const Capability& chosen() {
  static const Capability& capability = choose();
  return capability;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = chosen().table();
  return table;
}

const DepthwiseKernels& depthwise_kernels(DType type) {
  static const DepthwiseTable& table = chosen().depthwise_table();
  return table.of[static_cast<int>(type)];
}

}  // namespace se_ext::cpu

namespace se_ext {

std::string cpu_capability() {
  try {
    return cpu::chosen().name;
  } catch (const c10::Error& error) {
    throw std::invalid_argument(error.what_without_backtrace());  // which pybind11 knows as ValueError
  }
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const auto& c : cpu::kCapabilities) {
    if (c.supported()) names.emplace_back(c.name);
  }
  return names;
}

}  // namespace se_ext
