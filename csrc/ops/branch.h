// The transforms of the whole block, channel_add and channel_mul, as its operators get them.
#pragma once

#include <ATen/ATen.h>

#include <array>

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

  Branches(at::TensorList add, at::TensorList mul, const at::Tensor& x, bool may_be_none = false)
      : each{Branch(add, "add", {"add.w1", "add.b1", "add.norm_weight", "add.norm_bias", "add.w2", "add.b2"}, x),
             Branch(mul, "mul", {"mul.w1", "mul.b1", "mul.norm_weight", "mul.norm_bias", "mul.w2", "mul.b2"}, x)} {
    TORCH_CHECK(may_be_none || count() > 0, "the block needs an add or a mul branch, got neither");
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

}  // namespace gc
