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
//   TransformBackward(x, BackwardProblem, context, Unmerged, normalized)
//                                                             launch(TransformBackwardCall, Lent)
//
// And for the residual tail (ops/tail.h):
//
//   Statistics(y, of_batch)                                   launch(StatisticsCall, Lent)
//   PoolForward and PoolBackward, made with normalized        of x = slope (y - mean) + bias, read from y (Norm)
//   Residual(y, identity, out)                                launch(ResidualCall, Lent)
//   ResidualSums(y, products, grad, out, grad_in)             launch(ResidualSumsCall, Lent)
//   TransformBackward, made with normalized                   of a context of y - mean (NormalizedSums)
//   GradY(y, attention, of_batch, grad, grad_y)               launch(GradYCall, Lent)
//   static void norm_gradients(y, NormGradientsCall)          where there is no GradY to do it
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

struct StatisticsCall;

// Batch normalization of y, x = weight (y - mean) inverse_std + bias, where the slope is weight * inverse_std. Without a
// mean there is none, and x is y.
struct Norm {
  const void* mean = nullptr;         // A [C]
  const void* inverse_std = nullptr;  // A [C]
  Companion weight, bias;             // [C], or absent: 1, 0. A copy of the bias is kept
  // In the forward pass, where the statistics are not those of the batch: the call that copies what is given to mean,
  // inverse_std and bias. A device may have left that to the call of Residual, and read what is given.
  const StatisticsCall* given = nullptr;
};

struct PoolForwardCall {
  Norm norm;               // where the pass is normalized; what it gives as context is then that of y - mean
  Companion mask_weight;   // [C]     kMask
  Companion mask_bias;     // [1]     kMask, or absent
  Companion given_logits;  // [N, S]  kLogits
  double factor = 1;       // of the sum: 1, or 1 / S for the mean; kUniform
  // Results.
  void* logits = nullptr;   // A [N, S]     kMask
  void* context = nullptr;  // T [N, C]     or null
  void* state = nullptr;    // A [N, C + kStatistics], or null; for the mean (0, S, mean)
  // A [N, C + kStatistics], where the pass is normalized: beside the state, with the context of x. Its statistics may
  // be left out.
  void* state_of_x = nullptr;
};

struct PoolBackwardCall {
  Norm norm;                    // where the pass is normalized; grad_weight is then that of the slope * mask_weight
  const void* grad = nullptr;   // T like x    kBlock
  Companion scale;              // [N, C]      kBlock, or absent
  Companion grad_context;       // [N, C]
  Companion mask_weight;        // [C]         kMask, kBlock
  Companion logits;             // [N, S]
  const void* state = nullptr;  // A [N, C + kStatistics]
  // Results.
  void* grad_x = nullptr;     // T like x     or null
  CompanionOut grad_logits;   // [N, S]       kLogits, or where it is wanted
  CompanionOut grad_weight;   // [C]          kMask, kBlock, or absent
  void* attention = nullptr;  // A [N, S]: the softmax, where it is wanted
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

// What makes the branches' grad_outs in the residual tail: sum over the pixels of the gradient of x * scale + term, and of
// that times y - mean. That of add is sums, that of mul is slope * product_sums + bias * sums.
struct NormalizedSums {
  Norm norm;
  const void* sums;          // A [N, C]
  const void* product_sums;  // A [N, C], or null without mul
};

struct TransformBackwardCall {
  Kinds kinds;
  double factor;  // of grad_context
  const KeptParts& kept;
  std::array<void*, 2> grad_outs;  // A [N, C] of each branch, past its gate; may be overwritten
  void* grad_context;              // A [N, C], or null
  const Gradients& grads;          // results: those of the branches' parameters, and 0 for that of the mask's bias
  // The workspace of the sums before. Where it has partial results, they stand in place of grad_outs.
  const void* partials = nullptr;
  // With it, kept has the context of y - mean, and there are no grad_outs.
  const NormalizedSums* normalized = nullptr;
};

// Mean and variance of each channel, given or those of the batch.
struct StatisticsCall {
  double eps = 0;
  Companion given_mean, given_variance;  // [C]; not of_batch, or both absent: 0 and 1, exactly
  Companion given_bias;                  // [C], or absent
  Companion weight;                      // [C], or absent
  // Results.
  void *mean, *inverse_std, *variance;  // A [C]; the variance that is given, or the unbiased one of the batch
  void* bias;                           // A [C]: the same, which may be changed before the backward pass
  void* state = nullptr;                // A [N, C + kStatistics], or null; of_batch: the mean over pixels of y - mean
  void* state_of_x = nullptr;           // A [N, C + kStatistics], with state: as that of PoolForwardCall
  CompanionOut running_mean, running_variance;  // [C], or absent; of_batch: moved by momentum
  double momentum = 0;
};

// out = relu(slope (y - mean) scale + (bias scale + term) + identity)
struct ResidualCall {
  bool first = true;  // launch of its operator
  Norm norm;
  const void* identity = nullptr;                // T like y, or null
  const void *scale = nullptr, *term = nullptr;  // A [N, C], or null
  bool relu = true;
  void* out = nullptr;  // T like y
};

struct ResidualSumsCall {
  Norm norm;
  const void* grad = nullptr;  // T like y
  const void* out = nullptr;   // T like y, or null: without a ReLU
  // Results.
  void* grad_in = nullptr;       // T like y: grad where out > 0; only with out
  void* sums = nullptr;          // A [N, C]: of grad_in over the pixels
  void* product_sums = nullptr;  // A [N, C]: of grad_in * (y - mean); the pass has products
};

// Of the norm's parameters and of mask_weight. Results may be absent.
struct NormGradientsCall {
  Norm norm;
  const void *sums, *product_sums;     // A [N, C]; the latter null where grad_weight is not wanted
  const void* scale = nullptr;         // A [N, C], or null
  const void* grad_context = nullptr;  // A [N, C], or null: no block
  const void* state = nullptr;         // A [N, C + kStatistics]: the context of y - mean; with grad_context
  const void* grad_folded = nullptr;   // A [C]: of slope * mask_weight, or null: no attention
  Companion mask_weight;               // [C]
  // Results.
  void *grad_weight_sum = nullptr, *grad_bias_sum = nullptr;  // A [C]
  CompanionOut grad_weight, grad_bias, grad_mask_weight;      // [C]
};

// grad_y = slope (grad scale + what comes from the context - what comes from the statistics of the batch)
struct GradYCall {
  Norm norm;
  const void* grad = nullptr;                               // T like y: grad_in
  const void* scale = nullptr;                              // A [N, C], or null
  const void* grad_context = nullptr;                       // A [N, C], or null: no block
  const void *attention = nullptr, *grad_logits = nullptr;  // A [N, S]; with attention
  Companion mask_weight;                                    // [C]; with attention
  const void *grad_weight = nullptr, *grad_bias = nullptr;  // A [C]: of the norm; of_batch
  const NormGradientsCall* of_norm = nullptr;               // to be computed as well, before where of_batch
  void* grad_y = nullptr;                                   // T like y
};

}  // namespace gc
