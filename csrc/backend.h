// What an operator asks of a device. The operators' bodies (ops/*.h) are templates over a Device; cpu/device.cpp and
// cuda/device.cpp each have one. A Device is a struct of
//
//   static Tensor empty_output(const FeatureMap& x)           memory for an output like x
//   struct Counters(int64_t count, const FeatureMap& x)       get(): what the blocks of a launch meet by, zero at first
//   static void broadcast(x, BroadcastCall)                   x * scale + term
//
// and of passes, each planned from what decides on its work, so that the passes of a call share one allocation:
//
//   PoolForward(x, Weighting, transform_follows)              launch(PoolForwardCall, Lent), left()
//   PoolBackward(x, PoolGradient, grad_x, grad)               launch(PoolBackwardCall, Lent)
//   BroadcastBackward(x, grad, with_products, grad_x, transform_follows)
//                                                             launch(BroadcastBackwardCall, Lent), left()
//   TransformForward(x, branches, Unmerged)                   launch(TransformForwardCall, Lent)
//   TransformBackward(x, BackwardProblem, context, Unmerged)  launch(TransformBackwardCall, Lent)
//
// Where a transform follows, a pool may leave the context in parts, and the sums of the gradient theirs, in their
// workspace. What left() then says is for the transform, which merges them.
//
// wanted() says what launch() is to be lent. A pass refers to what it was made from, which must outlive it. A map of no
// images wants nothing, and nothing is computed.
//
// Pointers are to x's type T, or to the accumulation type A. Absent results and vectors are null.
#pragma once

#include <array>

#include "ops/needs.h"
#include "ops/problem.h"
#include "ops/state.h"

namespace gc {

struct Wanted {
  int64_t workspace = 0;  // elements of A
  int64_t counters = 0;
};

struct Lent {
  void* workspace = nullptr;
  unsigned* counters = nullptr;
};

// What a pass leaves in its workspace for the transform to merge: the partial results of so many splits of an image.
struct Unmerged {
  int splits = 1;  // 1: nothing is left, and the pass's own results are complete
  int chunks = 0;  // of channels, each with statistics of its own; 0: without a softmax there are none
};

struct PoolForwardCall {
  Companion mask_weight;   // [C]     kMask
  Companion mask_bias;     // [1]     kMask, or absent
  Companion given_logits;  // [N, S]  kLogits
  double factor = 1;       // of the sum: 1, or 1 / S for the mean; kUniform
  // Results.
  void* logits = nullptr;   // A [N, S]     kMask
  void* context = nullptr;  // T [N, C]     or null
  void* state = nullptr;    // A [N, C + kStatistics], or null; for the mean (0, S, mean)
};

struct PoolBackwardCall {
  const void* grad = nullptr;   // T like x    kBlock
  Companion scale;              // [N, C]      kBlock, or absent
  Companion grad_context;       // [N, C]
  Companion mask_weight;        // [C]         kMask, kBlock
  Companion logits;             // [N, S]
  const void* state = nullptr;  // A [N, C + kStatistics]
  // Results.
  void* grad_x = nullptr;    // T like x     or null
  CompanionOut grad_logits;  // [N, S]       kLogits
  CompanionOut grad_weight;  // [C]          kMask, kBlock, or absent
};

struct BroadcastCall {
  bool first = true;      // launch of its operator
  Companion scale, term;  // [N, C], or absent
  void* out = nullptr;    // T like x
};

// grad_x = grad * scale, grad_scale = sum_s grad * x, grad_term = sum_s grad; any of them may be absent.
struct BroadcastBackwardCall {
  Companion scale;  // [N, C]  with grad_x
  // Results.
  void* grad_x = nullptr;              // T like x
  CompanionOut grad_scale, grad_term;  // [N, C]
};

struct TransformForwardCall {
  Kinds kinds;
  double eps;
  const KeptParts& kept;      // of which the context is given, and normalized and inverse_deviation are results
  std::array<void*, 2> outs;  // A [N, C] of each branch
  // The pool before, and its workspace. Where that holds partial results, the state is a result, too.
  const PoolForwardCall& pooled;
  const void* partials;
};

struct TransformBackwardCall {
  Kinds kinds;
  double factor;  // of grad_context
  const KeptParts& kept;
  std::array<void*, 2> grad_outs;  // A [N, C] of each branch, past its gate; may be overwritten
  void* grad_context;              // A [N, C], or null
  const Gradients& grads;          // results: those of the branches' parameters, and 0 for that of the mask's bias
  const void* partials;  // the workspace of the sums before: where it has partial results, there are no grad_outs
};

}  // namespace gc
