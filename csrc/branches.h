// The transforms of the whole block as the CPU and CUDA bindings get them, and what a backward call wants of them.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "checks.h"
#include "kernels/policy.h"

namespace gc {

enum Parameter { kW1, kB1, kNormWeight, kNormBias, kW2, kB2, kParameters };
// The two branches, by number.
inline constexpr int kAdd = 0;
inline constexpr int kMul = 1;

// The transform of channel_add or channel_mul, P hidden units; hidden = 0 where it is absent.
struct Branch {
  int64_t hidden = 0;
  std::array<at::Tensor, kParameters> parameters;  // contiguous; the norm's two are not defined without a layer norm

  Branch(at::TensorList given, const char* name, const std::array<const char*, kParameters>& names,
         const at::Tensor& x) {
    if (given.empty()) return;
    const bool norm = given.size() == kParameters;
    TORCH_CHECK(norm || given.size() == kParameters - 2, name,
                " must be empty, or hold w1, b1, norm_weight, norm_bias, w2, b2, or those without the norm's two; got ",
                given.size(), " tensors");
    hidden = given[kB1].numel();
    TORCH_CHECK(hidden > 0, names[kB1], " must have at least one element, got shape ", given[kB1].sizes());
    size_t next = 0;
    for (int i = 0; i < kParameters; ++i) {
      if (!norm && (i == kNormWeight || i == kNormBias)) continue;
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

// Which gradients a call of global_context_backward wants, numbered as the operator returns them, and what follows:
// which intermediate gradients it takes.
struct Needs {
  static constexpr int kX = 0;
  static constexpr int kMaskWeight = 1;
  static constexpr int kCount = 2 + 2 * kParameters;
  static int index(int branch, Parameter which) { return 2 + kParameters * branch + which; }

  std::array<bool, kCount> needed;
  bool attention;  // else average pooling

  bool x() const { return needed[kX]; }
  bool mask_weight() const { return attention && needed[kMaskWeight]; }
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

// What global_context returns and global_context_backward takes again must be of one call.
inline void check_saved(const at::Tensor& x, bool attention, const Branches& branches, const at::Tensor& logits,
                        const at::Tensor& state, const at::Tensor& normalized, const at::Tensor& inverse_deviation,
                        const at::Tensor& scale) {
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const auto check = [&](const at::Tensor& tensor, const char* name, int64_t count) {
    check_companion(tensor, name, x, count);
    const at::ScalarType type = accumulation_type(x.scalar_type());
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
    TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  };
  check(logits, "logits", attention ? images * pixels : 0);
  check(state, "state", images * (channels + 2));
  check(normalized, "normalized", images * branches.hidden());
  check(inverse_deviation, "inverse_deviation", images * branches.count());
  check(scale, "scale", branches.has(kMul) ? images * channels : 0);
}

}  // namespace gc
