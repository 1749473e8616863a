// The problems that the transform's kernels are run on, each for a reason, and what both of its drivers need.
#pragma once

#include "cuda/kernels/args.h"
#include "feature_map.h"

namespace gc::drivers {

struct TransformCase {
  int images, channels;
  std::vector<int> hidden;  // of each branch
  int multiprocessors;      // of the device that is planned for: how many blocks share the work
  bool all_types;           // float64 and bfloat16 too
  bool misaligned;          // weights one element off an even address
  const char* reason;
  bool norm = true;
  Activation activation = Activation::kReLU;
  Gate gate = Gate::kSigmoid;  // of channel_mul

  int branches() const { return static_cast<int>(hidden.size()); }
  std::string to_string() const {
    std::string text = std::to_string(images) + "x" + std::to_string(channels);
    for (const int units : hidden) text += "-" + std::to_string(units);
    const char* const activations[] = {"relu", "silu", "hardswish"};
    text += std::string(norm ? "-norm-" : "-") + activations[static_cast<int>(activation)];
    return text + (gate == Gate::kHardsigmoid ? "-hardsigmoid" : "") + (misaligned ? "+1" : "");
  }
};

inline const std::vector<TransformCase>& transform_cases() {
  static const std::vector<TransformCase> cases = {
      {1, 1, {1}, 4, true, false, "the smallest: one channel, one hidden unit"},
      {2, 33, {5}, 4, true, false, "odd sizes: single weights, tails in both matrices"},
      {2, 64, {4}, 3, true, false, "a bottleneck of 1/16"},
      {3, 64, {16, 8}, 4, true, false, "both branches, of different width"},
      {2, 40, {6, 10}, 1, false, false, "one block a phase does all the work"},
      {2, 64, {8}, 2, false, true, "matrices one element off: no pairs of weights"},
      {1, 520, {130}, 8, false, false, "rows longer than a warp's step, more than one slab of either matrix"},
      {2, 1100, {72}, 4, true, false, "rows that warps share, each with a tail of its own"},
      {9, 36, {12}, 4, false, false, "more images than a slab takes at a time"},
      {37, 24, {6}, 1, false, false, "several tiles of images, of which a block takes more than one"},
      {70, 64, {64}, 1, false, false, "more images than are added one after the other, in the highest slabs"},
      {130, 24, {6}, 1, false, false, "and in the lowest"},
      {5, 16, {3000}, 2, false, false, "more hidden units than shared memory holds for all images at once"},
      {3, 64, {16}, 4, true, false, "Squeeze-and-Excitation of a ResNet: no norm", false},
      {3, 40, {10}, 4, true, false, "that of an EfficientNet", false, Activation::kSiLU},
      {3, 72, {24}, 4, true, false, "that of a MobileNetV3", false, Activation::kReLU, Gate::kHardsigmoid},
      {3, 64, {6, 8}, 4, false, false, "both branches without a norm", false, Activation::kHardswish},
      {2, 64, {8}, 4, false, false, "a norm before another activation", true, Activation::kSiLU},
      {2, 64, {8}, 4, false, false, "and before one with edges", true, Activation::kHardswish, Gate::kHardsigmoid},
  };
  return cases;
}

// A branch alone is channel_add or channel_mul in turn, as its weights are wide or not.
inline Gate gate_of(const TransformCase& on, int branch, bool wide) {
  const bool mul = on.branches() > 1 ? branch == 1 : wide || !on.norm;
  return mul ? on.gate : Gate::kNone;
}

// The functions and their derivatives (gradients for that of 1), after PyTorch's definitions.
inline double activate_of(Activation activation, double v) {
  if (activation == Activation::kReLU) return std::max(v, 0.0);
  if (activation == Activation::kSiLU) return v / (1 + std::exp(-v));
  return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
}
inline double slope_of(Activation activation, double v) {
  if (activation == Activation::kReLU) return v > 0 ? 1 : 0;
  const double s = 1 / (1 + std::exp(-v));
  if (activation == Activation::kSiLU) return s * (1 + v * (1 - s));
  return v <= -3 ? 0 : v < 3 ? v / 3 + 0.5 : 1;
}
inline constexpr double kSteepest = 1.5;  // of the activations
inline double pass_gate_of(Gate gate, double t) {
  if (gate == Gate::kNone) return t;
  return gate == Gate::kSigmoid ? 1 / (1 + std::exp(-t)) : std::min(std::max(t + 3, 0.0), 6.0) / 6;
}
inline double gate_slope_of(Gate gate, double out) {
  if (gate == Gate::kNone) return 1;
  return gate == Gate::kSigmoid ? out * (1 - out) : out > 0 && out < 1 ? 1.0 / 6 : 0;
}

inline TransformProblem problem_of(const TransformCase& on, ElementType type) {
  TransformProblem problem{on.images, on.channels, on.branches(), {on.hidden[0], 0}, type, !on.misaligned};
  if (on.branches() > 1) problem.hidden[1] = on.hidden[1];
  return problem;
}

inline DeviceLimits device_of(const TransformCase& on, const host::Schedule& schedule = {}) {
  return {on.multiprocessors, host::kMaxSharedOptIn, paths_under(schedule)};
}

class PhaseCounters {
 public:
  explicit PhaseCounters(const TransformPlan& plan)
      : buffer_("counters", std::vector<unsigned>(plan.counters, 0), Use::kState) {}
  unsigned* data() { return buffer_.data(); }
  void check() const {
    for (std::size_t i = 0; i < buffer_.size(); ++i) host::require(buffer_[i] == 0, "counters are 0 after a launch");
  }

 private:
  Buffer<unsigned> buffer_;
};

// One case for every problem and element type; run(element, problem, wide, bits, schedule).
template <typename Run>
std::vector<host::Case> cases_of(const std::string& name, bool wide_first, const Run& run) {
  std::vector<host::Case> list;
  bool wide = wide_first;  // weights in the element's type and in the accumulation type take turns
  for (const TransformCase& on : transform_cases()) {
    each_type(on.all_types, [&](auto element) {
      using T = decltype(element);
      wide = !wide;
      auto bits = std::make_shared<SameBits>();
      list.push_back({name + "-" + Element<T>::name + (wide ? "-wide-" : "-") + on.to_string(), on.reason,
                      [=, wide = wide](const host::Schedule& schedule) { run(element, on, wide, *bits, schedule); }});
    });
    wide = !wide;
  }
  return list;
}

}  // namespace gc::drivers
