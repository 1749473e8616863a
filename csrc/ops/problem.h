// What a call of global_context_backward is given, checked.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "ops/needs.h"
#include "ops/state.h"

namespace gc {

using Gradients = std::array<Tensor, Needs::kCount>;

struct BackwardProblem {
  const OptionalTensor &mask_weight, &mask_bias;
  Branches branches;
  Needs needs;
  Kept kept;

  // map: of x, or of grad where x is None.
  BackwardProblem(const FeatureMap& map, const Tensor& grad, bool x_given, const OptionalTensor& weight,
                  const OptionalTensor& bias, at::TensorList add, at::TensorList mul, const Tensor& kept_before,
                  std::array<bool, Needs::kCount> needed)
      : mask_weight(weight),
        mask_bias(bias),
        branches(add, mul, map.tensor()),
        needs{needed, weight.has_value()},
        kept(map, weight.has_value(), branches) {
    check_like(grad, "grad", map.tensor());
    check_mask(weight, bias, map.tensor());
    check_kept(kept_before, map.tensor(), kept.elements);
    TORCH_CHECK(x_given || !needs.reads_x(branches),
                "x must be given for the gradients of x or mask_weight and for a mul branch, got None");
    for (int i = 1; i < Needs::kCount; ++i) {
      TORCH_CHECK(!needed[i] || parameter(i).defined(), "needed[", i, "] asks for the gradient of what is not given");
    }
  }

  // As a part of the residual tail, which has checked the rest.
  BackwardProblem(const FeatureMap& map, const OptionalTensor& weight, const OptionalTensor& bias,
                  const Branches& checked, const Needs& wanted)
      : mask_weight(weight),
        mask_bias(bias),
        branches(checked),
        needs(wanted),
        kept(map, weight.has_value(), branches) {}

  // Number i of Needs, but for x; not defined where there is none.
  Tensor parameter(int i) const {
    if (i == Needs::kMaskWeight) return mask_weight.value_or(Tensor());
    if (i == Needs::kMaskBias) return mask_bias.value_or(Tensor());
    const int which = i - Needs::index(kAdd, kW1);
    return branches.each[which / kParameters].parameters[which % kParameters];
  }

  // Those of parameters that are needed, each with memory of its own.
  Gradients empty_gradients() const {
    Gradients grads;
    for (int i = 1; i < Needs::kCount; ++i) {
      if (needs.needed[i]) grads[i] = empty_gradient(parameter(i));
    }
    return grads;
  }

  // Those that are needed, as the operator returns them.
  std::vector<Tensor> only_needed(Gradients& grads) const {
    std::vector<Tensor> given;
    given.reserve(Needs::kCount);
    for (int i = 0; i < Needs::kCount; ++i) {
      if (needs.needed[i]) given.push_back(std::move(grads[i]));
    }
    return given;
  }
};

}  // namespace gc
