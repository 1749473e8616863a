// The passes of the residual tail's backward pass (ops/tail.h), but for those that it shares with the block.
#pragma once

#include <optional>

#include "cuda/tail.h"

namespace gc::cuda {

class ResidualSums {
 public:
  // grad, out, grad_in: their addresses; null where there is none.
  ResidualSums(const FeatureMap& y, bool products, const void* grad, const void* out, const void* grad_in)
      : y_(y),
        products_(products),
        plan_(plan_for(KernelKind::kResidualSums, y, {grad, out, grad_in, products ? y.data() : nullptr})) {}
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  void launch(const ResidualSumsCall& call, Lent lent) const {
    ResidualSumsArgs args{};
    args.grad = call.grad;
    args.out = call.out;
    if (products_) args.y = y_.data();
    args.mean = wide(call.norm.mean);
    args.grad_in = call.grad_in;
    args.sums = call.sums;
    args.product_sums = call.product_sums;
    args.partial_sums = lent.workspace;
    args.tickets = lent.counters;
    C10_CUDA_CHECK(launch_residual_sums(plan_, args, stream_of(y_)));
  }

 private:
  const FeatureMap& y_;
  bool products_;
  Plan plan_;
};

inline NormGradientsArgs norm_gradients_args(const FeatureMap& y, const NormGradientsCall& call) {
  NormGradientsArgs args{};
  args.norm = norm_args(call.norm);
  args.images = static_cast<int>(y.images());
  args.channels = static_cast<int>(y.channels());
  args.sums = call.sums;
  args.product_sums = call.product_sums;
  args.scale = call.scale;
  args.grad_context = call.grad_context;
  args.state = call.state;
  args.grad_folded = call.grad_folded;
  args.mask_weight = call.mask_weight;
  args.weight_sum = call.grad_weight_sum;
  args.bias_sum = call.grad_bias_sum;
  args.grad_weight = call.grad_weight;
  args.grad_bias = call.grad_bias;
  args.grad_mask_weight = call.grad_mask_weight;
  return args;
}

inline void norm_gradients(const FeatureMap& y, const NormGradientsCall& call) {
  C10_CUDA_CHECK(launch_norm_gradients(element_type(y.type()), norm_gradients_args(y, call), stream_of(y)));
}

class GradY {
 public:
  // grad, grad_y: their addresses.
  GradY(const FeatureMap& y, bool attention, bool of_batch, const void* grad, const void* grad_y)
      : y_(y),
        attention_(attention),
        of_batch_(of_batch),
        plan_(plan_for(KernelKind::kGradY, y, {grad, grad_y, of_batch ? y.data() : nullptr})) {
    // As the pass before did not: the images that it took last are in the second-level cache.
    plan_.walk.backwards = !attention;
  }
  static Wanted wanted() { return {}; }
  void launch(const GradYCall& call, Lent) const {
    GradYArgs args{};
    args.norm = norm_args(call.norm);
    args.grad = call.grad;
    args.scale = call.scale;
    args.grad_context = call.grad_context;
    if (attention_) {
      args.attention = call.attention;
      args.grad_logits = call.grad_logits;
      args.mask_weight = call.mask_weight;
    }
    if (of_batch_) {
      args.y = y_.data();
      args.grad_weight = call.grad_weight;
      args.grad_bias = call.grad_bias;
    }
    if (call.of_norm != nullptr) {
      if (of_batch_) {
        norm_gradients(y_, *call.of_norm);
      } else {
        args.beside = norm_gradients_args(y_, *call.of_norm);
      }
    }
    args.grad_y = call.grad_y;
    C10_CUDA_CHECK(launch_grad_y(plan_, args, stream_of(y_)));
  }

 private:
  const FeatureMap& y_;
  bool attention_, of_batch_;
  Plan plan_;
};

}  // namespace gc::cuda
