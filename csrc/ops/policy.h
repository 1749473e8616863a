// What the transform of a branch may be made of: shared by the kernels, the CPU implementation and both bindings.
#pragma once

namespace gc {

// Of the hidden units.
enum class Activation : int { kReLU, kSiLU, kHardswish };
inline constexpr int kActivations = 3;
// What a branch's output goes through.
enum class Gate : int { kNone, kSigmoid, kHardsigmoid };
inline constexpr int kGates = 2;  // apart from kNone

}  // namespace gc
