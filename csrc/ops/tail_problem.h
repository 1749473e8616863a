// What a call of the residual tail is given, checked; what it keeps, and what its backward pass wants.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"

namespace gc {

// Where the statistics of the norm come from: there is no norm, they are given, or they are those of the batch.
enum class NormKind : int { kNone, kGiven, kBatch };
inline constexpr int kNormKinds = 3;

struct NormSource {
  OptionalTensor mean, variance;  // kGiven
  double eps;
};

// A process group of torch.distributed, by the name under which that knows it; without a name there is none.
struct Group {
  std::string name;
  int64_t size;

  Group(c10::string_view given_name, int64_t given_size)
      : name(given_name.data(), given_name.size()), size(given_size) {
    TORCH_CHECK(size > 0, "group_size must be 1 or more, got ", size);
  }

  // Whether the statistics of the batch are those of several processes.
  bool exchanges(NormKind kind) const { return kind == NormKind::kBatch && !name.empty() && size > 1; }
};

// Where each part begins in one tensor of the accumulation type. gc_cuda/ops/tail.py has the same sizes.
struct TailKept {
  int64_t mean, inverse_std, variance, bias;  // [C]
  int64_t block;                              // Kept, where there is a block
  int64_t elements;

  TailKept(const FeatureMap& y, bool attention, const Branches& branches) {
    mean = 0;
    inverse_std = mean + y.channels();
    variance = inverse_std + y.channels();
    bias = variance + y.channels();
    block = bias + y.channels();
    elements = block + (branches.count() > 0 ? Kept(y, attention, branches).elements : 0);
  }
};

struct TailParts {
  void *mean, *inverse_std, *variance, *bias;
  std::optional<KeptParts> block;  // of y - mean: its context is that before slope and bias

  TailParts(void* memory, const TailKept& kept, const FeatureMap& y, bool attention, const Branches& branches) {
    const auto at = [&](int64_t start) { return after(memory, start, y.accumulation_bytes()); };
    mean = at(kept.mean);
    inverse_std = at(kept.inverse_std);
    variance = at(kept.variance);
    bias = at(kept.bias);
    if (branches.count() == 0) return;
    block.emplace(at(kept.block), Kept(y, attention, branches), y, branches);
  }
};

// Which gradients a call of bn_context_add_relu_backward wants, numbered as the operator's argument, and what follows.
class TailNeeds {
 public:
  static constexpr int kY = 0, kIdentity = 1, kWeight = 2, kBias = 3, kBlock = 4;
  static constexpr int kCount = kBlock - 1 + Needs::kCount;  // the block's x is y

  TailNeeds(const std::array<bool, kCount>& needed, bool attention, bool of_batch)
      : needed_(needed), of_batch_(of_batch), of_block_{{}, attention} {
    // What depends on the gradient of the context.
    of_block_.needed[Needs::kX] = y() || needed_[kWeight] || needed_[kBias];
    for (int i = 1; i < Needs::kCount; ++i) of_block_.needed[i] = needed_[kBlock + i - 1];
  }

  bool at(int i) const { return needed_[i]; }
  bool y() const { return needed_[kY]; }
  bool identity() const { return needed_[kIdentity]; }
  const Needs& of_block() const { return of_block_; }
  // That of the norm's weight, because it is wanted or is a part of grad_y.
  bool weight() const { return needed_[kWeight] || (of_batch_ && y()); }
  bool products(bool with_mul) const { return with_mul || weight(); }
  bool pooling() const { return y() || weight() || of_block_.mask_weight(); }
  // Any of those that norm_gradients gives.
  bool norm() const { return weight() || needed_[kBias] || (of_block_.attention && of_block_.mask_weight()); }
  // Whether y itself is read.
  bool reads_y(const Branches& branches) const {
    return products(of_block_.branch(branches, kMul)) || (of_block_.attention && branches.count() > 0 && pooling());
  }

 private:
  std::array<bool, kCount> needed_;
  bool of_batch_;
  Needs of_block_;
};

inline void check_running(const OptionalTensor& running, const char* name, const Tensor& y) {
  if (!running.has_value()) return;
  check_companion(*running, name, y, y.size(1));
  TORCH_CHECK(running->is_contiguous(), name, " must be contiguous, got strides ", running->strides());
}

struct TailProblem {
  NormKind kind;
  Tensor weight, bias;  // contiguous, or not defined
  const OptionalTensor &mask_weight, &mask_bias;
  Tensor image_factor;  // of what is added to identity: A [N, 1], or not defined
  Branches branches;
  std::optional<Kinds> kinds;
  TailKept kept;

  TailProblem(const FeatureMap& map, int64_t norm_kind, const OptionalTensor& norm_weight,
              const OptionalTensor& norm_bias, const OptionalTensor& of_mask, const OptionalTensor& of_mask_bias,
              at::TensorList add, at::TensorList mul, int64_t activation, int64_t gate, const OptionalTensor& of_image)
      : kind(static_cast<NormKind>(norm_kind)),
        weight(contiguous(norm_weight)),
        bias(contiguous(norm_bias)),
        mask_weight(of_mask),
        mask_bias(of_mask_bias),
        branches(add, mul, map.tensor(), /*may_be_none=*/true),
        kinds(Kinds(activation, gate)),
        kept(map, attention(), branches) {
    TORCH_CHECK(norm_kind >= 0 && norm_kind < kNormKinds, "norm_kind must be one of 0 to ", kNormKinds - 1, ", got ",
                norm_kind);
    const Tensor& y = map.tensor();
    TORCH_CHECK(has_norm() || !(weight.defined() || bias.defined()), "weight and bias must be None without a norm");
    if (weight.defined()) check_companion(weight, "weight", y, y.size(1));
    if (bias.defined()) check_companion(bias, "bias", y, y.size(1));
    check_mask(mask_weight, mask_bias, y);
    if (of_image.has_value()) {
      check_companion(*of_image, "image_factor", y, y.size(0));
      image_factor = of_image->to(accumulation_type(map.type())).reshape({y.size(0), 1});
    }
    TORCH_CHECK(has_block() || !attention(), "mask_weight must be None without an add or a mul branch");
  }

  bool has_norm() const { return kind != NormKind::kNone; }
  bool has_block() const { return branches.count() > 0; }
  bool of_batch() const { return kind == NormKind::kBatch; }
  bool attention() const { return mask_weight.has_value(); }

  Norm norm(const FeatureMap& map, const TailParts& parts) const {
    return {parts.mean, parts.inverse_std, map.companion(weight), wide(parts.bias)};
  }

  void check_forward(const FeatureMap& map, const OptionalTensor& identity, const NormSource& source, double eps,
                     bool exchanges) const {
    const Tensor& y = map.tensor();
    if (identity.has_value()) check_like(*identity, "identity", y);
    check_epsilon(eps);
    TORCH_CHECK(source.eps >= 0, "norm_eps must be 0 or more, got ", source.eps);
    const bool given = kind == NormKind::kGiven;
    TORCH_CHECK(source.mean.has_value() == given && source.variance.has_value() == given, "mean and variance must ",
                given ? "be given" : "be None", " for norm_kind ", static_cast<int>(kind));
    if (given) {
      check_companion(*source.mean, "mean", y, y.size(1));
      check_companion(*source.variance, "variance", y, y.size(1));
    }
    TORCH_CHECK_VALUE(!of_batch() || exchanges || map.images() * map.pixels() != 1,
                      "Expected more than 1 value per channel when training, got input size ", y.sizes());
  }

  void check_backward(const FeatureMap& map, const Tensor& grad, const OptionalTensor& y, const OptionalTensor& out,
                      const Tensor& kept_before, const TailNeeds& needs) const {
    check_like(grad, "grad", map.tensor());
    if (out.has_value()) check_like(*out, "out", map.tensor());
    check_kept(kept_before, map.tensor(), kept.elements);
    TORCH_CHECK(y.has_value() || !needs.reads_y(branches), "y must be given for these gradients, got None");
    for (int i = TailNeeds::kWeight; i < TailNeeds::kCount; ++i) {
      TORCH_CHECK(!needs.at(i) || parameter(i).defined(), "needed[", i, "] asks for the gradient of what is not given");
    }
  }

  // Number i of TailNeeds, but for y and identity; not defined where there is none.
  Tensor parameter(int i) const {
    if (i == TailNeeds::kWeight) return weight;
    if (i == TailNeeds::kBias) return bias;
    const int of_block = i - TailNeeds::kBlock + 1;
    if (of_block == Needs::kMaskWeight) return mask_weight.value_or(Tensor());
    if (of_block == Needs::kMaskBias) return mask_bias.value_or(Tensor());
    const int which = of_block - Needs::index(kAdd, kW1);
    return branches.each[which / kParameters].parameters[which % kParameters];
  }
};

struct TailGradients {
  Tensor y, identity, weight, bias;
  Gradients of_block;  // but for x

  // Memory for those of parameters.
  TailGradients(const TailProblem& problem, const TailNeeds& needs) : needs_(needs) {
    for (int i = TailNeeds::kWeight; i < TailNeeds::kCount; ++i) {
      if (needs.at(i)) place(i) = empty_gradient(problem.parameter(i));
    }
  }

  void zero() {
    for (int i = 0; i < TailNeeds::kCount; ++i) {
      if (place(i).defined()) place(i).zero_();
    }
  }

  // Those that are needed, as the operator returns them.
  std::vector<Tensor> only_needed() {
    std::vector<Tensor> given;
    for (int i = 0; i < TailNeeds::kCount; ++i) {
      if (needs_.at(i)) given.push_back(std::move(place(i)));
    }
    return given;
  }

 private:
  Tensor& place(int i) {
    const std::array<Tensor*, TailNeeds::kBlock> first{&y, &identity, &weight, &bias};
    return i < TailNeeds::kBlock ? *first[i] : of_block[i - TailNeeds::kBlock + 1];
  }

  const TailNeeds& needs_;
};

}  // namespace gc
