// Quotients by a divisor that the host knows: a multiplication and a shift for numerators below 2^31 (Granlund and
// Montgomery 1994), the processor's division beyond.
#pragma once

#include "platform.cuh"

namespace se_ext::cuda {

struct Divider {
  std::int64_t divisor;
  std::uint32_t magic = 0;
  int shift = 0;

  struct Result {
    std::int64_t quotient, remainder;
  };

  explicit Divider(std::int64_t d) : divisor(d < 1 ? 1 : d) {
    if (divisor > INT32_MAX) return;
    while ((std::int64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<std::uint32_t>((((std::uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  SE_EXT_DEVICE Result operator()(std::int64_t n) const {
    if (n <= INT32_MAX && divisor <= INT32_MAX) {
      const auto small = static_cast<std::uint32_t>(n);
      const std::uint32_t q = (__umulhi(small, magic) + small) >> shift;
      return {q, small - q * static_cast<std::uint32_t>(divisor)};
    }
    return {n / divisor, n % divisor};
  }
};

}  // namespace se_ext::cuda
