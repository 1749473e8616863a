// The transforms of the whole block as the CPU and CUDA bindings get them, and what a backward call wants of them.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "ops/checks.h"
#include "ops/policy.h"

namespace gc {

enum Parameter { kW1, kB1, kNormWeight, kNormBias, kW2, kB2, kParameters };
// The two branches, by number.
inline constexpr int kAdd = 0;
inline constexpr int kMul = 1;

// Whether a branch that is given as so many tensors has this parameter.
inline bool is_given(size_t tensors, Parameter which) {
  return tensors == kParameters || (tensors > 0 && which != kNormWeight && which != kNormBias);
}

// The transform of channel_add or channel_mul, P hidden units; hidden = 0 where it is absent.
struct Branch {
  int64_t hidden = 0;
  std::array<at::Tensor, kParameters> parameters;  // contiguous; the norm's two are not defined without a layer norm

  Branch(at::TensorList given, const char* name, const std::array<const char*, kParameters>& names,
         const at::Tensor& x) {
    if (given.empty()) return;
    TORCH_CHECK(given.size() == kParameters || given.size() == kParameters - 2, name,
                " must be empty, or hold w1, b1, norm_weight, norm_bias, w2, b2, or those without the norm's two; got ",
                given.size(), " tensors");
    hidden = given[kB1].numel();
    TORCH_CHECK(hidden > 0, names[kB1], " must have at least one element, got shape ", given[kB1].sizes());
    size_t next = 0;
    for (int i = 0; i < kParameters; ++i) {
      if (!is_given(given.size(), static_cast<Parameter>(i))) continue;
      check(given[next], static_cast<Parameter>(i), names[i], x);
      parameters[i] = given[next++].contiguous();
    }
  }

 private:
  void check(const at::Tensor& tensor, Parameter which, const char* name, const at::Tensor& x) const {
    const int64_t channels = x.size(1);
    switch (which) {
      case kW1:
        return check_matrix(tensor, name, x, hidden, channels);
      case kW2:
        return check_matrix(tensor, name, x, channels, hidden);
      case kB2:
        return check_companion(tensor, name, x, channels);
      default:
        return check_companion(tensor, name, x, hidden);
    }
  }
};

struct Branches {
  std::array<Branch, 2> each;  // add, mul

  Branches(at::TensorList add, at::TensorList mul, const at::Tensor& x)
      : each{Branch(add, "add", {"add.w1", "add.b1", "add.norm_weight", "add.norm_bias", "add.w2", "add.b2"}, x),
             Branch(mul, "mul", {"mul.w1", "mul.b1", "mul.norm_weight", "mul.norm_bias", "mul.w2", "mul.b2"}, x)} {
    TORCH_CHECK(has(kAdd) || has(kMul), "the block needs an add or a mul branch, got neither");
  }

  bool has(int b) const { return each[b].hidden > 0; }
  int64_t hidden() const { return each[kAdd].hidden + each[kMul].hidden; }
  int64_t count() const { return has(kAdd) + has(kMul); }
  // Where a branch's part of `normalized` begins, per image; and its row of `inverse_deviation`.
  int64_t hidden_before(int b) const { return b == kAdd ? 0 : each[kAdd].hidden; }
  int64_t row(int b) const { return b == kMul && has(kAdd); }
};

// How both branches are activated, and what channel_mul's output goes through: the operators' numbers, checked.
struct Kinds {
  Activation activation;
  Gate gate;

  Kinds(int64_t activation_number, int64_t gate_number)
      : activation(static_cast<Activation>(checked(activation_number, "activation", kActivations))),
        gate(static_cast<Gate>(1 + checked(gate_number, "gate", kGates))) {}

  Gate of(int branch) const { return branch == kMul ? gate : Gate::kNone; }

 private:
  static int checked(int64_t number, const char* name, int count) {
    TORCH_CHECK(number >= 0 && number < count, name, " must be one of 0 to ", count - 1, ", got ", number);
    return static_cast<int>(number);
  }
};

// Which gradients a call of global_context_backward wants, numbered as the operator's argument, and what follows: which
// intermediate gradients it takes.
struct Needs {
  static constexpr int kX = 0;
  static constexpr int kMaskWeight = 1;
  static constexpr int kMaskBias = 2;
  static constexpr int kCount = 3 + 2 * kParameters;
  static int index(int branch, Parameter which) { return 3 + kParameters * branch + which; }

  std::array<bool, kCount> needed;
  bool attention;  // else average pooling

  bool x() const { return needed[kX]; }
  bool mask_weight() const { return needed[kMaskWeight]; }
  bool mask_bias() const { return needed[kMaskBias]; }
  bool parameter(int b, Parameter which) const { return needed[index(b, which)]; }
  bool context() const { return x() || mask_weight(); }
  bool hidden(int b) const { return context() || parameter(b, kW1) || parameter(b, kB1); }
  bool activated(int b) const { return hidden(b) || parameter(b, kNormWeight) || parameter(b, kNormBias); }
  bool branch(const Branches& branches, int b) const {
    return branches.has(b) && (activated(b) || parameter(b, kW2) || parameter(b, kB2));
  }
  // Whether the feature map itself is read, and not the gradient alone.
  bool reads_x(const Branches& branches) const { return branch(branches, kMul) || (attention && context()); }
};

// What the forward pass keeps for the backward pass, one tensor of the accumulation type: where each part begins. No
// gaps, so that all of it is written and two calls keep the same bits.
// gc_cuda/_fake.py has the same sizes.
struct Kept {
  int64_t state = 0;          // [N, C + 2]: the largest logit m, z = sum_s exp(logit[s] - m), the context
  int64_t logits;             // [N, S]; none for average pooling
  int64_t normalized;         // [N, P] of add, then of mul: what leaves the layer norms before their weight and bias
  int64_t inverse_deviation;  // [branches, N]
  int64_t scale;              // [N, C]; none without mul
  int64_t elements;

  Kept(int64_t images, int64_t channels, int64_t pixels, bool attention, const Branches& branches) {
    logits = state + images * (channels + 2);
    normalized = logits + (attention ? images * pixels : 0);
    inverse_deviation = normalized + images * branches.hidden();
    scale = inverse_deviation + images * branches.count();
    elements = scale + (branches.has(kMul) ? images * channels : 0);
  }
};

// What a call of global_context_backward is given, checked.
struct BackwardProblem {
  using OptionalTensor = std::optional<at::Tensor>;
  using Gradients = std::array<at::Tensor, Needs::kCount>;

  const OptionalTensor &mask_weight, &mask_bias;
  Branches branches;
  Needs needs;
  Kept kept;

  // like: x, or grad where x is None.
  BackwardProblem(const at::Tensor& grad, const OptionalTensor& x, const OptionalTensor& weight,
                  const OptionalTensor& bias, at::TensorList add, at::TensorList mul, const at::Tensor& kept_before,
                  const at::Tensor& like, std::array<bool, Needs::kCount> needed)
      : mask_weight(weight),
        mask_bias(bias),
        branches(add, mul, like),
        needs{needed, weight.has_value()},
        kept(like.size(0), like.size(1), like.size(2) * like.size(3), weight.has_value(), branches) {
    check_like(grad, "grad", like);
    check_mask(weight, bias, like);
    check_companion(kept_before, "kept", like, kept.elements);
    const at::ScalarType type = accumulation_type(like.scalar_type());
    TORCH_CHECK_TYPE(kept_before.scalar_type() == type, "kept must be ", type, ", got ", kept_before.scalar_type());
    TORCH_CHECK(kept_before.is_contiguous(), "kept must be contiguous, got strides ", kept_before.strides());
    TORCH_CHECK(x.has_value() || !needs.reads_x(branches),
                "x must be given for the gradients of x or mask_weight and for a mul branch, got None");
    for (int i = 1; i < Needs::kCount; ++i) {
      TORCH_CHECK(!needed[i] || parameter(i).defined(), "needed[", i, "] asks for the gradient of what is not given");
    }
  }

  // Number i of Needs, but for x; not defined where there is none.
  at::Tensor parameter(int i) const {
    if (i == Needs::kMaskWeight) return mask_weight.value_or(at::Tensor());
    if (i == Needs::kMaskBias) return mask_bias.value_or(at::Tensor());
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
  std::vector<at::Tensor> only_needed(Gradients& grads) const {
    std::vector<at::Tensor> given;
    given.reserve(Needs::kCount);
    for (int i = 0; i < Needs::kCount; ++i) {
      if (needs.needed[i]) given.push_back(std::move(grads[i]));
    }
    return given;
  }
};

}  // namespace gc
