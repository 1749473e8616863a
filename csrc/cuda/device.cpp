// The CUDA device (csrc/backend.h): passes on tensors become planned launches on the current stream. No
// synchronisation; every buffer but the counters (launch/counters.cpp) comes from torch's allocator. Of csrc/cuda, only
// this file and the headers beside it know torch, and launch/ what it asks torch for.
#include <optional>

#include "cuda/tail.h"
#include "cuda/tail_backward.h"
#include "cuda/transform.h"
#include "ops/operators.h"

namespace gc::cuda {

namespace {

KernelKind kind_of(Weighting weighting, bool normalized) {
  switch (weighting) {
    case Weighting::kMask:
      return normalized ? KernelKind::kPoolMaskNormalized : KernelKind::kPoolMask;
    case Weighting::kLogits:
      return normalized ? KernelKind::kPoolLogitsNormalized : KernelKind::kPoolLogits;
    default:
      return normalized ? KernelKind::kPoolUniformNormalized : KernelKind::kPoolUniform;
  }
}

KernelKind kind_of(PoolGradient gradient) {
  switch (gradient) {
    case PoolGradient::kBlock:
      return KernelKind::kPoolBackwardBlock;
    case PoolGradient::kMask:
      return KernelKind::kPoolBackwardMask;
    default:
      return KernelKind::kPoolBackwardLogits;
  }
}

// dots[n, s] = vector . x[:, s] + bias, for maps with more channels than a block can hold; with a state, of x without
// its context. image_stride: of the vector, 0 where all images share it.
PixelDotArgs dots_args(const FeatureMap& x, Companion vector, int64_t image_stride, Companion bias, const void* state,
                       void* dots) {
  PixelDotArgs args{};
  args.x = x.data();
  args.vector = vector;
  args.image_stride = image_stride;
  args.bias = bias;
  args.offset = after(state, kStatistics, x.accumulation_bytes());
  args.offset_stride = x.channels() + kStatistics;
  args.dots = dots;
  return args;
}

void launch_dots(const FeatureMap& x, const Plan& plan, const NormalizedPixelDotArgs& args, bool normalized) {
  C10_CUDA_CHECK(normalized ? launch_normalized_pixel_dot(plan, args, stream_of(x))
                            : launch_pixel_dot(plan, args, stream_of(x)));
}

void fill(PoolForwardArgs& args, const FeatureMap& x, const Plan& plan, Lent lent) {
  args.x = x.data();
  args.partial_context = lent.workspace;
  args.partial_stats = after(lent.workspace, x.images() * merged_rows(plan.walk.splits, plan.walk.group) * x.channels(),
                             x.accumulation_bytes());
  args.tickets = lent.counters;
}

void launch_pool(const FeatureMap& x, const Plan& plan, PoolForwardArgs args, Lent lent) {
  fill(args, x, plan, lent);
  C10_CUDA_CHECK(launch_pool_forward(plan, args, stream_of(x)));
}

// Passes that pool. A map with more channels than a block holds takes a launch of pixel_dot before.

class PoolForward {
 public:
  PoolForward(const FeatureMap& x, Weighting weighting, bool transform_follows = false, bool normalized = false)
      : x_(x), softmax_(weighting != Weighting::kUniform), normalized_(normalized) {
    if (x.images() == 0) return;
    Planning planning;
    if (transform_follows) planning.late_splits = kMostLateSplits;
    plan_ = plan_for(kind_of(weighting, normalized), x, {x.data()}, planning);
    if (plan_.holds_channels) return;
    dots_ = plan_for(normalized ? KernelKind::kPixelDotNormalized : KernelKind::kPixelDot, x, {x.data()});
    plan_ = plan_for(kind_of(Weighting::kLogits, normalized), x, {x.data()}, planning);
  }
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  Unmerged left() const {
    if (!plan_.paths.has(Path::kLateMerge)) return {};
    return {plan_.walk.splits, softmax_ ? plan_.chunks : 0};
  }
  void launch(const PoolForwardCall& call, Lent lent) const {
    if (x_.images() == 0) return;
    NormalizedPoolArgs args{};
    args.norm = norm_args(call.norm);
    args.state_of_x = call.state_of_x;
    if (dots_) {
      const PixelDotArgs dots = dots_args(x_, call.mask_weight, 0, call.mask_bias, nullptr, call.logits);
      launch_dots(x_, *dots_, {dots, args.norm}, normalized_);
      args.given_logits = wide(call.logits);
    } else {
      args.mask_weight = call.mask_weight;
      args.mask_bias = call.mask_bias;
      args.given_logits = call.given_logits;
      args.logits = call.logits;
    }
    args.factor = call.factor;
    args.context = {call.context, false};
    args.state = call.state;
    fill(args, x_, plan_, lent);
    C10_CUDA_CHECK(normalized_ ? launch_normalized_pool(plan_, args, stream_of(x_))
                               : launch_pool_forward(plan_, args, stream_of(x_)));
  }

 private:
  const FeatureMap& x_;
  bool softmax_, normalized_;
  std::optional<Plan> dots_;
  Plan plan_{};
};

class PoolBackward {
 public:
  // grad_x, grad: their addresses; null where there is none.
  PoolBackward(const FeatureMap& x, PoolGradient gradient, const void* grad_x, const void* grad,
               bool normalized = false)
      : x_(x), normalized_(normalized) {
    if (x.images() == 0) return;
    const KernelKind kind = normalized ? KernelKind::kPoolBackwardNormalized : kind_of(gradient);
    plan_ = plan_for(kind, x, {x.data(), grad_x, grad});
    if (plan_.holds_channels) return;
    dots_ = plan_for(normalized ? KernelKind::kPixelDotNormalized : KernelKind::kPixelDot, x, {x.data()});
    Planning planning;
    planning.dots_given = true;
    plan_ = plan_for(kind, x, {x.data(), grad_x, grad}, planning);
  }
  Wanted wanted() const { return {plan_.workspace + dots_elements(), plan_.tickets}; }
  void launch(const PoolBackwardCall& call, Lent lent) const {
    if (x_.images() == 0) return;
    NormalizedPoolBackwardArgs args{};
    if (dots_) {
      NormalizedPixelDotArgs dots{dots_args(x_, call.grad_context, x_.channels(), {}, call.state, lent.workspace),
                                  norm_args(call.norm)};
      dots.norm.bias = {};  // the context has it, too
      launch_dots(x_, *dots_, dots, normalized_);
      args.dots = lent.workspace;
    }
    args.x = x_.data();
    args.grad = call.grad;
    args.scale = call.scale;
    args.grad_context = call.grad_context;
    args.mask_weight = call.mask_weight;
    args.logits = call.logits;
    args.state = call.state;
    args.grad_x = call.grad_x;
    args.grad_logits = call.grad_logits;
    args.grad_weight = call.grad_weight;
    args.partial_weight = after(lent.workspace, dots_elements(), x_.accumulation_bytes());
    args.tickets = lent.counters;
    if (!normalized_) {
      C10_CUDA_CHECK(launch_pool_backward(plan_, args, stream_of(x_)));
      return;
    }
    args.norm = norm_args(call.norm);
    args.attention = call.attention;
    C10_CUDA_CHECK(launch_normalized_pool_backward(plan_, args, stream_of(x_)));
  }

 private:
  int64_t dots_elements() const { return dots_ ? x_.images() * x_.pixels() : 0; }

  const FeatureMap& x_;
  bool normalized_;
  std::optional<Plan> dots_;
  Plan plan_{};
};

// Without products and grad_x it is a sum over pixels, which is pool_forward's.
class BroadcastBackward {
 public:
  BroadcastBackward(const FeatureMap& x, const FeatureMap& grad, bool with_products, const void* grad_x,
                    bool transform_follows = false)
      : x_(x), grad_(grad), with_products_(with_products) {
    if (x.images() == 0) return;
    Planning planning;
    if (transform_follows) planning.late_splits = kMostGatheredSplits;
    plan_ = with_products ? plan_for(KernelKind::kBroadcastMulBackward, x, {x.data(), grad.data(), grad_x}, planning)
                          : plan_for(KernelKind::kPoolUniform, grad, {grad.data()}, planning);
  }
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  Unmerged left() const {
    if (!plan_.walk.merged_later) return {};
    return {plan_.walk.splits, 0};
  }
  void launch(const BroadcastBackwardCall& call, Lent lent) const {
    if (x_.images() == 0) return;
    if (!with_products_) {
      PoolForwardArgs args{};
      args.factor = 1;
      args.context = call.grad_term;
      return launch_pool(grad_, plan_, args, lent);
    }
    BroadcastMulBackwardArgs args{};
    args.grad = grad_.data();
    args.x = x_.data();
    args.scale = call.scale;
    args.grad_x = call.grad_x;
    args.grad_scale = call.grad_scale;
    args.grad_term = call.grad_term;
    args.partial_sums = lent.workspace;
    args.tickets = lent.counters;
    C10_CUDA_CHECK(launch_broadcast_mul_backward(plan_, args, stream_of(x_)));
  }

 private:
  const FeatureMap &x_, &grad_;
  bool with_products_;
  Plan plan_{};
};

struct Device {
  using PoolForward = cuda::PoolForward;
  using PoolBackward = cuda::PoolBackward;
  using BroadcastBackward = cuda::BroadcastBackward;
  using TransformForward = cuda::TransformForward;
  using TransformBackward = cuda::TransformBackward;
  using Statistics = cuda::Statistics;
  using Residual = cuda::Residual;
  using ResidualSums = cuda::ResidualSums;
  using GradY = cuda::GradY;

  struct Counters : cuda::Counters {
    Counters(int64_t count, const FeatureMap& x) : cuda::Counters(count, x.tensor().device().index(), stream_of(x)) {}
  };

  static constexpr auto norm_gradients = cuda::norm_gradients;
  static Tensor empty_output(const FeatureMap& x) { return at::empty(x.tensor().sizes(), x.like()); }
  static void broadcast(const FeatureMap& x, const BroadcastCall& call) {
    if (x.images() == 0) return;
    BroadcastArgs args{};
    args.x = x.data();
    args.scale = call.scale;
    args.term = call.term;
    args.out = call.out;
    Plan plan = plan_for(KernelKind::kBroadcast, x, {args.x, args.out});
    if (call.first) plan.paths = plan.paths.without(Path::kEarlyStart);
    C10_CUDA_CHECK(launch_broadcast(plan, args, stream_of(x)));
  }
};

}  // namespace

}  // namespace gc::cuda

TORCH_LIBRARY_IMPL(gc_cuda, CUDA, m) {
  gc::ops::register_operators<gc::cuda::Device>(m);
  gc::ops::register_tail<gc::cuda::Device>(m);
}
