// The words in which operators, kernels and the CPU speak of a pass over a feature map. No torch, no CUDA.
#pragma once

namespace gc {

// Of the hidden units.
enum class Activation : int { kReLU, kSiLU, kHardswish };
inline constexpr int kActivations = 3;
// What a branch's output goes through.
enum class Gate : int { kNone, kSigmoid, kHardsigmoid };
inline constexpr int kGates = 2;  // apart from kNone

// Where the weights of the weighted sum over pixels come from: all are 1, logits are given, or the mask gives them.
enum class Weighting : int { kMask, kLogits, kUniform };

// What the backward pass of pooling computes.
enum class PoolGradient : int {
  kLogits,  // of softmax pooling: grad_x and grad_logits
  kMask,    // of attention pooling: grad_x and grad_mask_weight
  kBlock,   // of a whole context block: attention pooling's, and grad * scale in grad_x
};

// What pooling leaves of an image, its state: the largest logit m, z = sum_s exp(logit[s] - m), and the context [C].
inline constexpr int kStatistics = 2;  // m and z

// A small vector in x's type or, `wide`, in the accumulation type. `data` is null where the vector is absent.
struct Companion {
  const void* data = nullptr;
  bool wide = false;
};
struct CompanionOut {
  void* data = nullptr;
  bool wide = false;
};

}  // namespace gc
