// The CUDA device (csrc/backend.h): passes on tensors become planned launches on the current stream. No synchronisation;
// every buffer but the counters (launch/counters.cpp) comes from torch's allocator. Of csrc/cuda, only the files that
// include this know torch.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "backend.h"
#include "cuda/launch/counters.h"
#include "cuda/launch/launch.h"

namespace gc::cuda {

ElementType element_type(at::ScalarType type);

inline cudaStream_t stream_of(const FeatureMap& x) {
  return c10::cuda::getCurrentCUDAStream(x.tensor().device().index());
}

// Passes that pool. A map with more channels than a block holds takes a launch of pixel_dot before.

class PoolForward {
 public:
  PoolForward(const FeatureMap& x, Weighting weighting);
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  void launch(const PoolForwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  std::optional<Plan> dots_;
  Plan plan_{};
};

class PoolBackward {
 public:
  // grad_x, grad: their addresses; null where there is none.
  PoolBackward(const FeatureMap& x, PoolGradient gradient, const void* grad_x, const void* grad);
  Wanted wanted() const { return {plan_.workspace + dots_elements(), plan_.tickets}; }
  void launch(const PoolBackwardCall& call, Lent lent) const;

 private:
  int64_t dots_elements() const { return dots_ ? x_.images() * x_.pixels() : 0; }

  const FeatureMap& x_;
  std::optional<Plan> dots_;
  Plan plan_{};
};

// Without products and grad_x it is a sum over pixels, which is pool_forward's.
class BroadcastBackward {
 public:
  BroadcastBackward(const FeatureMap& x, const FeatureMap& grad, bool with_products, const void* grad_x);
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  void launch(const BroadcastBackwardCall& call, Lent lent) const;

 private:
  const FeatureMap &x_, &grad_;
  bool with_products_;
  Plan plan_{};
};

class TransformForward {
 public:
  TransformForward(const FeatureMap& x, const Branches& branches);
  Wanted wanted() const { return {plan_.workspace, plan_.counters}; }
  void launch(const TransformForwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  const Branches& branches_;
  std::vector<int> live_;  // the branches that take part
  TransformProblem problem_;
  TransformPlan plan_;
};

class TransformBackward {
 public:
  TransformBackward(const FeatureMap& x, const BackwardProblem& of, const void* context);
  Wanted wanted() const { return {plan_.workspace, plan_.counters}; }
  void launch(const TransformBackwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  const BackwardProblem& of_;
  std::vector<int> live_;
  TransformProblem problem_;
  TransformPlan plan_;
};

struct Device {
  using PoolForward = cuda::PoolForward;
  using PoolBackward = cuda::PoolBackward;
  using BroadcastBackward = cuda::BroadcastBackward;
  using TransformForward = cuda::TransformForward;
  using TransformBackward = cuda::TransformBackward;

  struct Counters : cuda::Counters {
    Counters(int64_t count, const FeatureMap& x) : cuda::Counters(count, x.tensor().device().index(), stream_of(x)) {}
  };

  static Tensor empty_output(const FeatureMap& x) { return at::empty(x.tensor().sizes(), x.like()); }
  static void broadcast(const FeatureMap& x, const BroadcastCall& call);
};

}  // namespace gc::cuda
