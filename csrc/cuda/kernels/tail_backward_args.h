// What the kernels of the residual tail's backward pass take (ops/tail.h), as args.h has it for the others. G is the
// gradient of the tail's output, g what the ReLU lets through of it.
#pragma once

#include "tail_args.h"

namespace gc {

struct ResidualSumsArgs {
  Walk walk;
  const void* grad;    // T [N, C, S] or [N, S, C]: G
  const void* out;     // T like grad, or null: without a ReLU
  const void* y;       // T like grad, or null: without products
  Companion mean;      // [C], or absent: 0    with products
  void* grad_in;       // T like grad out: g, with out
  void* sums;          // A [N, C] out
  void* product_sums;  // A [N, C] out, with products
  void* partial_sums;  // A [2, N, rows, C] workspace, splits > 1; rows = merged_rows(splits, group)
  unsigned* tickets;   // [N, chunks, merge_tickets(splits, group)], 0 before and after; splits > 1
};

// The block's pass with a mask, which reads y in place of x and has no grad_x: grad_logits and grad_weight are those of
// the logits and of slope * mask_weight, and state has the context of y - mean. No mask_weight.
struct NormalizedPoolBackwardArgs : PoolBackwardArgs {
  NormArgs norm;
  void* attention;  // A [N, S] out: the softmax
};

// The transform of x, with the context of y - mean. Each branch's grad_out is the sums over g of residual_sums.
struct NormalizedTransformBackwardArgs : TransformBackwardArgs {
  static constexpr bool kNormalized = true;
  NormArgs norm;
  const void* product_sums;  // A [N, C]: of residual_sums    with channel_mul
};

// Of the norm's parameters and of mask_weight. Results may be null.
struct NormGradientsArgs {
  NormArgs norm;
  int images, channels;
  const void* sums;                     // A [N, C] of residual_sums
  const void* product_sums;             // A [N, C], or null where nothing needs the weight's gradient
  const void* scale;                    // A [N, C], or null
  const void* grad_context;             // A [N, C], or null: no block
  const void* state;                    // A [N, C + 2] of the forward pass   with grad_context
  const void* grad_folded;              // A [C] of pool_backward, or null
  Companion mask_weight;                // [C]                                with grad_folded
  void *weight_sum, *bias_sum;          // A [C] out
  CompanionOut grad_weight, grad_bias;  // [C]   out
  CompanionOut grad_mask_weight;        // [C]   out, with grad_folded
};

struct GradYArgs {
  Walk walk;
  NormArgs norm;
  const void* grad;          // T [N, C, S] or [N, S, C]: g
  const void* y;             // T like grad              of the batch
  const void* scale;         // A [N, C], or null
  const void* grad_context;  // A [N, C], or null: no block
  const void* attention;     // A [N, S]                 with attention
  const void* grad_logits;   // A [N, S]                 with attention
  Companion mask_weight;     // [C]                      with attention
  const void* grad_weight;   // A [C] of norm_gradients  of the batch
  const void* grad_bias;     // A [C] of norm_gradients  of the batch
  void* grad_y;              // T like grad out
  NormGradientsArgs beside;  // what it computes besides; without channels nothing. Not of the batch
};

}  // namespace gc
