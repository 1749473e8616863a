// The passes that the residual tail (ops/tail.h) has alone.
#pragma once

#include <optional>

#include "cuda/tensors.h"

namespace gc::cuda {

inline NormArgs norm_args(const Norm& norm) {
  NormArgs args{};
  args.weight = norm.weight;
  if (norm.given != nullptr) {  // and not yet copied
    args.mean = norm.given->given_mean;
    args.variance = norm.given->given_variance;
    args.bias = norm.given->given_bias;
    args.eps = norm.given->eps;
  } else {
    args.mean = wide(norm.mean);
    args.inverse_std = wide(norm.inverse_std);
    args.bias = norm.bias;
  }
  return args;
}

inline KeptNorm kept_by(const StatisticsCall& call) { return {call.mean, call.inverse_std, call.variance, call.bias}; }

// Of the batch. Statistics that are given need no launch: the passes after this one read them, and Residual copies them.
class Statistics {
 public:
  Statistics(const FeatureMap& y, bool of_batch) : y_(y) {
    if (of_batch && y.images() > 0) plan_ = plan_for(KernelKind::kStatistics, y, {y.data()});
  }
  Wanted wanted() const { return plan_ ? Wanted{plan_->workspace, plan_->tickets} : Wanted{}; }
  void launch(const StatisticsCall& call, Lent lent) const {
    if (!plan_) return;
    StatisticsArgs args{};
    args.y = y_.data();
    args.eps = call.eps;
    args.weight = call.weight;
    args.bias = call.given_bias;
    args.kept = kept_by(call);
    args.running_mean = call.running_mean;
    args.running_variance = call.running_variance;
    args.momentum = call.momentum;
    args.state = call.state;
    args.state_of_x = call.state_of_x;
    args.partials = lent.workspace;
    args.tickets = lent.counters;
    C10_CUDA_CHECK(launch_statistics(*plan_, args, stream_of(y_)));
  }

 private:
  const FeatureMap& y_;
  std::optional<Plan> plan_;
};

class Residual {
 public:
  // identity, out: their addresses; null where there is no identity.
  Residual(const FeatureMap& y, const void* identity, const void* out) : y_(y) {
    if (y.images() > 0) plan_ = plan_for(KernelKind::kResidual, y, {y.data(), identity, out});
  }
  static Wanted wanted() { return {}; }
  void launch(const ResidualCall& call, Lent) const {
    if (y_.images() == 0) return;
    ResidualArgs args{};
    args.y = y_.data();
    args.identity = call.identity;
    args.norm = norm_args(call.norm);
    args.scale = call.scale;
    args.term = call.term;
    args.relu = call.relu;
    args.out = call.out;
    if (call.norm.given != nullptr) args.kept = kept_by(*call.norm.given);
    Plan plan = plan_;
    if (call.first) plan.paths = plan.paths.without(Path::kEarlyStart);
    C10_CUDA_CHECK(launch_residual(plan, args, stream_of(y_)));
  }

 private:
  const FeatureMap& y_;
  Plan plan_{};
};

}  // namespace gc::cuda
