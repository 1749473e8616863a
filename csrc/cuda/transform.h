// The passes of the transform.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/tail_backward.h"
#include "cuda/tensors.h"

namespace gc::cuda {

// The branches that take part in a launch, as the launch plan sees them.
inline TransformProblem problem_of(const FeatureMap& x, const Branches& branches, const std::vector<int>& live,
                                   bool pairs) {
  TransformProblem problem{};
  problem.images = x.images();
  problem.channels = x.channels();
  problem.branches = static_cast<int>(live.size());
  problem.type = element_type(x.type());
  problem.pairs = pairs;
  for (size_t i = 0; i < live.size(); ++i) {
    const Branch& branch = branches.each[live[i]];
    problem.hidden[i] = branch.hidden;
    for (const Parameter which : {kW1, kW2}) {
      const Tensor& matrix = branch.parameters[which];
      const uintptr_t address = reinterpret_cast<uintptr_t>(matrix.data_ptr());
      problem.pairs = problem.pairs && address % (2 * matrix.element_size()) == 0;
    }
  }
  return problem;
}

inline TransformPlan plan_for(TransformPass pass, const FeatureMap& x, const TransformProblem& problem,
                              TransformDepth depth, bool merges) {
  try {
    return planned(pass, problem, x.tensor().device().index(), depth, merges);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "the transform beside x of shape ", x.tensor().sizes(), " is too large: ", error.what());
  }
}

inline TransformDepth depth_of(const Needs& needs, const std::vector<int>& live) {
  if (needs.context()) return TransformDepth::kContext;
  const bool deep = std::any_of(live.begin(), live.end(), [&](int b) { return needs.activated(b); });
  return deep ? TransformDepth::kParameters : TransformDepth::kLastLayer;
}

template <typename Lives>
std::vector<int> branches_that(const Lives& lives) {
  std::vector<int> live;
  for (const int b : {kAdd, kMul}) {
    if (lives(b)) live.push_back(b);
  }
  return live;
}

class TransformForward {
 public:
  // The context begins where memory does, but for two elements: in pairs.
  TransformForward(const FeatureMap& x, const Branches& branches, const Unmerged& left)
      : x_(x),
        branches_(branches),
        left_(left),
        live_(branches_that([&](int b) { return branches.has(b); })),
        problem_(problem_of(x, branches, live_, true)),
        plan_(plan_for(TransformPass::kForward, x, problem_, TransformDepth::kContext, left.splits > 1)) {}
  Wanted wanted() const { return {plan_.workspace, plan_.counters}; }
  void launch(const TransformForwardCall& call, Lent lent) const {
    TransformForwardArgs args{};
    args.counters = lent.counters;
    args.images = static_cast<int>(x_.images());
    args.channels = static_cast<int>(x_.channels());
    args.branches = problem_.branches;
    args.eps = call.eps;
    args.activation = call.kinds.activation;
    args.context = call.kept.context;
    args.context_stride = x_.channels() + kStatistics;
    if (left_.splits > 1) args.partial = partial_of(call);
    for (size_t i = 0; i < live_.size(); ++i) {
      const int b = live_[i];
      const Branch& given = branches_.each[b];
      TransformBranch& branch = args.branch[i];
      branch.hidden = static_cast<int>(given.hidden);
      branch.w1 = x_.companion(given.parameters[kW1]);
      branch.b1 = x_.companion(given.parameters[kB1]);
      branch.norm_weight = x_.companion(given.parameters[kNormWeight]);
      branch.norm_bias = x_.companion(given.parameters[kNormBias]);
      branch.w2 = x_.companion(given.parameters[kW2]);
      branch.b2 = x_.companion(given.parameters[kB2]);
      branch.gate = call.kinds.of(b);
      branch.products = after(lent.workspace, branches_.hidden_before(b) * x_.images(), x_.accumulation_bytes());
      branch.normalized = call.kept.normalized[b];
      branch.inverse_deviation = call.kept.inverse_deviation[b];
      branch.out = call.outs[b];
    }
    C10_CUDA_CHECK(launch_transform_forward(plan_, args, stream_of(x_)));
  }

 private:
  // The workspace is that of launch_pool.
  PartialContext partial_of(const TransformForwardCall& call) const {
    PartialContext partial{};
    partial.splits = left_.splits;
    partial.pixels = static_cast<int>(x_.pixels());
    partial.sums = call.partials;
    if (left_.chunks > 0) {
      partial.stats = after(call.partials, x_.images() * left_.splits * x_.channels(), x_.accumulation_bytes());
      partial.stats_stride = int64_t{2} * left_.chunks * left_.splits;
    }
    partial.factor = call.pooled.factor;
    partial.state = call.kept.state;
    return partial;
  }

  const FeatureMap& x_;
  const Branches& branches_;
  Unmerged left_;
  std::vector<int> live_;  // the branches that take part
  TransformProblem problem_;
  TransformPlan plan_;
};

class TransformBackward {
 public:
  TransformBackward(const FeatureMap& x, const BackwardProblem& of, const void* context, const Unmerged& left = {},
                    bool /*normalized*/ = false)
      : x_(x),
        of_(of),
        left_(left),
        live_(branches_that([&](int b) { return of.needs.branch(of.branches, b); })),
        problem_(problem_of(x, of.branches, live_,
                            reinterpret_cast<uintptr_t>(context) % (2 * x.accumulation_bytes()) == 0)),
        plan_(plan_for(TransformPass::kBackward, x, problem_, depth_of(of.needs, live_), left.splits > 1)) {}
  Wanted wanted() const { return {plan_.workspace, plan_.counters}; }
  void launch(const TransformBackwardCall& call, Lent lent) const {
    NormalizedTransformBackwardArgs args{};
    args.counters = lent.counters;
    args.images = static_cast<int>(x_.images());
    args.channels = static_cast<int>(x_.channels());
    args.branches = problem_.branches;
    args.context = call.kept.context;
    args.context_stride = x_.channels() + kStatistics;
    args.factor = call.factor;
    args.activation = call.kinds.activation;
    args.grad_context = call.grad_context;
    args.zero = x_.companion_out(call.grads[Needs::kMaskBias]);
    if (left_.splits > 1) args.partial = partial_of(call);
    int64_t taken = 0;
    const auto take = [&](int64_t elements) {
      void* const start = after(lent.workspace, taken, x_.accumulation_bytes());
      taken += elements;
      return start;
    };
    for (size_t i = 0; i < live_.size(); ++i) {
      const int b = live_[i];
      const Branch& given = of_.branches.each[b];
      const auto out = [&](Parameter which) { return x_.companion_out(call.grads[Needs::index(b, which)]); };
      const TransformWorkspace own = backward_workspace(problem_, plan_, static_cast<int>(i));
      TransformGradients& branch = args.branch[i];
      branch.hidden = static_cast<int>(given.hidden);
      branch.w1 = x_.companion(given.parameters[kW1]);
      branch.norm_weight = x_.companion(given.parameters[kNormWeight]);
      branch.norm_bias = x_.companion(given.parameters[kNormBias]);
      branch.w2 = x_.companion(given.parameters[kW2]);
      branch.normalized = call.kept.normalized[b];
      branch.inverse_deviation = call.kept.inverse_deviation[b];
      branch.grad_out = call.normalized != nullptr ? call.normalized->sums : call.grad_outs[b];
      branch.gate = call.kinds.of(b);
      branch.gate_out = b == kMul ? call.kept.scale : nullptr;
      branch.grad_w1 = out(kW1);
      branch.grad_b1 = out(kB1);
      branch.grad_norm_weight = out(kNormWeight);
      branch.grad_norm_bias = out(kNormBias);
      branch.grad_w2 = out(kW2);
      branch.grad_b2 = out(kB2);
      branch.partial_y = take(own.partial_y);
      branch.grad_y = take(own.grad_y);
      branch.grad_hidden = take(own.grad_hidden);
      branch.partial_context = take(own.partial_context);
    }
    if (call.normalized == nullptr) {
      C10_CUDA_CHECK(launch_transform_backward(plan_, args, stream_of(x_)));
      return;
    }
    args.norm = norm_args(call.normalized->norm);
    args.product_sums = call.normalized->product_sums;
    C10_CUDA_CHECK(launch_normalized_transform_backward(plan_, args, stream_of(x_)));
  }

 private:
  // The workspace is that of the sums: with products, those of channel_mul come first.
  PartialGradients partial_of(const TransformBackwardCall& call) const {
    const int64_t elements = x_.images() * left_.splits * x_.channels();
    const bool with_products = live_.back() == kMul;
    PartialGradients partial{};
    partial.splits = left_.splits;
    for (size_t i = 0; i < live_.size(); ++i) {
      const bool second = with_products && live_[i] == kAdd;
      partial.sums[i] = second ? after(call.partials, elements, x_.accumulation_bytes()) : call.partials;
    }
    return partial;
  }

  const FeatureMap& x_;
  const BackwardProblem& of_;
  Unmerged left_;
  std::vector<int> live_;
  TransformProblem problem_;
  TransformPlan plan_;
};

}  // namespace gc::cuda
