// What the forward and the backward pass of the whole block share on the CPU.
//
// Everything between the passes over x has N * C or P * C elements. No step of it is an ATen operator: for a small x
// those would cost more than the work, and so would an allocation for every intermediate result.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/feature_map.h"
#include "cpu/run.h"
#include "cpu/transform.h"
#include "ops/branches.h"

namespace gc::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The one element of a small tensor.
template <typename T>
acc_t<T> scalar(const Tensor& tensor) {
  return with_weight<T>(tensor, [](auto* data) { return static_cast<acc_t<T>>(*data); });
}

// The kept results of a forward pass in memory.
template <typename A>
struct KeptParts {
  A *state, *logits, *normalized, *inverse_deviation, *scale;

  KeptParts(A* memory, const Kept& kept)
      : state(memory + kept.state),
        logits(memory + kept.logits),
        normalized(memory + kept.normalized),
        inverse_deviation(memory + kept.inverse_deviation),
        scale(memory + kept.scale) {}
};

// The vectors of a branch in the accumulation type.
template <typename T>
struct WidenedVectors {
  Widened<T> b1, norm_weight, norm_bias, b2;

  explicit WidenedVectors(const Branch& branch)
      : b1(branch.parameters[kB1]),
        norm_weight(branch.parameters[kNormWeight]),
        norm_bias(branch.parameters[kNormBias]),
        b2(branch.parameters[kB2]) {}

  void take_from(Scratch<acc_t<T>>& scratch) {
    for (Widened<T>* one : {&b1, &norm_weight, &norm_bias, &b2}) one->take_from(scratch);
  }
};

}  // namespace gc::cpu
