// Cases that hold a kernel to the accuracy of PyTorch's own operators. The other cases allow an error relative to the
// sum of the magnitudes of what is added, which cannot see what rounding leaves where large terms cancel or where a
// chain of additions is long. These compare the largest error with the largest value, and with what eager float32
// leaves on the very same numbers: tests/host/eager_errors.py measures that and prints what is written beside each
// case.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "memory.h"

namespace gc::drivers {

// Multiples of 2^(1 - bits) in -1 .. 1, the same ones as in eager_errors.py.
class Pattern {
 public:
  Pattern(std::uint32_t seed, int bits) : seed_(seed), bits_(bits) {}

  double operator()(std::size_t i) const {
    std::uint32_t h = static_cast<std::uint32_t>(i) * 0x9e3779b9u + seed_;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    h ^= h >> 16;
    return std::ldexp(static_cast<double>(h >> (32 - bits_)), 1 - bits_) - 1;
  }

 private:
  std::uint32_t seed_;
  int bits_;
};

// The largest error over the largest value, in units of 2^-24.
class LargestError {
 public:
  void add(double got, double want) {
    const double error = std::abs(got - want);
    error_ = std::isfinite(error) ? std::max(error_, error) : std::numeric_limits<double>::infinity();
    value_ = std::max(value_, std::abs(want));
  }
  double units() const { return error_ == 0 ? 0 : error_ / value_ * 0x1p24; }

  // eager: what PyTorch's operators leave. GC_HOST_ERRORS in the environment prints what is found.
  void require(const std::string& what, double eager) const {
    if (std::getenv("GC_HOST_ERRORS") != nullptr) std::printf("%s: %.1f, eager %.1f\n", what.c_str(), units(), eager);
    host::require(units() <= 2 * eager + 4, what + " got an error of " + std::to_string(units()) +
                                                " units of 2^-24 of the largest value; eager has " +
                                                std::to_string(eager));
  }

 private:
  double error_ = 0, value_ = 0;
};

// Runs under one schedule, for none changes a bit (SameBits), and not under the race checker, which others are for.
template <typename Run>
host::Case accuracy_case(const std::string& name, const std::string& reason, const Run& run) {
  auto is_done = std::make_shared<bool>(host::kRaceBuild);
  return {"accuracy-" + name, reason, [=](const host::Schedule& schedule) {
            if (*is_done) return;
            *is_done = true;
            run(schedule);
          }};
}

}  // namespace gc::drivers
