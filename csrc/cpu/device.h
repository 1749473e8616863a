// The CPU (csrc/backend.h): passes on tensors. The cut of the work over threads is in run.h, what is computed in simd/.
//
// No step of a pass is an ATen operator: for a small x those would cost more than the work, and so would an allocation
// for every intermediate result.
#pragma once

#include "backend.h"
#include "cpu/pages.h"
#include "cpu/plan.h"

namespace gc::cpu {

class PoolForward {
 public:
  PoolForward(const FeatureMap& x, Weighting weighting);
  Wanted wanted() const;
  void launch(const PoolForwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  Weighting weighting_;
  Shape shape_;  // without logits, planes are taken in small groups
  Plan plan_;
};

class PoolBackward {
 public:
  PoolBackward(const FeatureMap& x, PoolGradient gradient, const void* grad_x, const void* grad);
  Wanted wanted() const;
  void launch(const PoolBackwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  PoolGradient gradient_;
  Shape shape_;
  Plan plan_;
};

class BroadcastBackward {
 public:
  BroadcastBackward(const FeatureMap& x, const FeatureMap& grad, bool with_products, const void* grad_x);
  Wanted wanted() const;
  void launch(const BroadcastBackwardCall& call, Lent lent) const;

 private:
  const FeatureMap &x_, &grad_;
  bool with_products_;
  Shape shape_;  // planes are taken in small groups
  Plan plan_;
};

class TransformForward {
 public:
  TransformForward(const FeatureMap& x, const Branches& branches) : x_(x), branches_(branches) {}
  Wanted wanted() const;
  void launch(const TransformForwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  const Branches& branches_;
};

class TransformBackward {
 public:
  TransformBackward(const FeatureMap& x, const BackwardProblem& of, const void*) : x_(x), of_(of) {}
  Wanted wanted() const;
  void launch(const TransformBackwardCall& call, Lent lent) const;

 private:
  const FeatureMap& x_;
  const BackwardProblem& of_;
};

struct Device {
  using PoolForward = cpu::PoolForward;
  using PoolBackward = cpu::PoolBackward;
  using BroadcastBackward = cpu::BroadcastBackward;
  using TransformForward = cpu::TransformForward;
  using TransformBackward = cpu::TransformBackward;

  struct Counters {  // threads meet where a pass ends
    Counters(int64_t, const FeatureMap&) {}
    static unsigned* get() { return nullptr; }
  };

  static Tensor empty_output(const FeatureMap& x) { return cpu::empty_output(x.tensor().sizes(), x.like()); }
  static void broadcast(const FeatureMap& x, const BroadcastCall& call);
};

}  // namespace gc::cpu
