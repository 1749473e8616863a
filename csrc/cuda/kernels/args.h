// What each kernel takes: plain pointers and sizes, filled in by the launch side, which knows types and layouts.
// T is the feature map's element type, A the accumulation type (float; double for double).
#pragma once

#include "geometry.h"
#include "ops/policy.h"

namespace gc {

struct PoolForwardArgs {
  Walk walk;
  const void* x;           // T [N, C, S] or [N, S, C]
  Companion mask_weight;   // [C]              kMask
  Companion mask_bias;     // [1] or absent    kMask
  Companion given_logits;  // [N, S]           kLogits
  double factor;           //                  kUniform
  void* logits;            // A [N, S]     out, kMask
  CompanionOut context;    // [N, C]       out, or null
  void* state;             // A [N, C + 2] out, or null
  void* partial_context;   // A [N, rows, C]         workspace, splits > 1; rows = merged_rows(splits, group)
  void* partial_stats;     // A [N, chunks, rows, 2] workspace, splits > 1, but kUniform
  // [N, chunks, merge_tickets(splits, group)], 0 before and after; splits > 1, unless they are merged later
  unsigned* tickets;
};

struct PoolBackwardArgs {
  Walk walk;
  const void* x;             // T [N, C, S] or [N, S, C]
  const void* grad;          // T like x            kBlock
  Companion scale;           // [N, C] or absent    kBlock
  Companion grad_context;    // [N, C]
  Companion mask_weight;     // [C]      with a mask
  Companion logits;          // [N, S]
  const void* state;         // A [N, C + 2] of the forward pass
  const void* dots;          // A [N, S], or null: computed here
  void* grad_x;              // T like x out, or null
  CompanionOut grad_logits;  // [N, S]   out, without a mask
  CompanionOut grad_weight;  // [C]      out, with a mask, or null
  void* partial_weight;      // A [merged_rows(N * splits, group), C] workspace, with a mask
  unsigned* tickets;         // [chunks, merge_tickets(N * splits, group)], 0 before and after; with a mask
};

struct PixelDotArgs {
  Walk walk;
  const void* x;           // T [N, C, S] or [N, S, C]
  Companion vector;        // [N, C], or [C] with image_stride 0
  long long image_stride;  // from one image's vector to the next: C or 0
  Companion bias;          // [1] or absent
  const void* offset;      // A, image n's [C] from n * offset_stride on, or null
  long long offset_stride;
  void* dots;  // A [N, S] out
};

struct BroadcastArgs {
  Walk walk;
  const void* x;    // T [N, C, S] or [N, S, C]
  Companion scale;  // [N, C] or absent
  Companion term;   // [N, C] or absent
  void* out;        // T like x
};

struct BroadcastMulBackwardArgs {
  Walk walk;
  const void* grad;         // T [N, C, S] or [N, S, C]
  const void* x;            // T like grad
  Companion scale;          // [N, C]      with grad_x
  void* grad_x;             // T like grad out, or null
  CompanionOut grad_scale;  // [N, C]      out
  CompanionOut grad_term;   // [N, C]      out, or null
  void* partial_sums;       // A [2, N, rows, C] workspace, splits > 1; rows = merged_rows(splits, group)
  // [N, chunks, merge_tickets(splits, group)], 0 before and after; splits > 1, unless they are merged later
  unsigned* tickets;
};

// The blocks of each phase of a launch, see phases.h.
inline constexpr int kMaxPhases = 3;
inline constexpr int kPhaseCounters = 1 + kMaxPhases;
struct PhaseGrid {
  int phases;
  int blocks[kMaxPhases];
};

// What a launch that begins early has come to the second-level cache before it waits: weights, which no launch of its
// operator writes. Counted in cache lines on the host: what the kernel would compute for them costs it registers.
inline constexpr int kCacheLine = 128;  // bytes
struct Prefetches {
  int count;  // 0 in any other launch
  unsigned lines[4];
  const void* begin[4];
};

// One branch of the context block, channel_add or channel_mul, with P = hidden units.
struct TransformBranch {
  int hidden;
  Companion w1;             // [P, C]
  Companion b1;             // [P]
  Companion norm_weight;    // [P], or absent: no layer norm
  Companion norm_bias;      // [P]
  Companion w2;             // [C, P]
  Companion b2;             // [C]
  Gate gate;                // that the output goes through
  void* products;           // A [N, P] workspace: W1 . context + b1
  void* normalized;         // A [N, P] out
  void* inverse_deviation;  // A [N]    out
  void* out;                // A [N, C] out
};

// The partial results that pool_forward has left where the transform merges them (late_merge.h).
struct PartialContext {
  int splits;  // of an image
  int pixels;
  const void* sums;   // A [N, splits, C]
  const void* stats;  // A, image n's [splits, 2] from n * stats_stride on, or null: no softmax
  long long stats_stride;
  double factor;  // of the sums, without a softmax
  void* state;    // A [N, C + 2] out
};

struct TransformForwardArgs {
  PhaseGrid grid;
  unsigned* counters;  // [kPhaseCounters], 0 before and after
  int images, channels, branches;
  int tile_images;  // of a tile of either phase
  int shares[2];    // of each phase: the warps that share the length of a row
  double eps;
  Activation activation;
  const void* context;  // A, image n's [C] from n * context_stride on
  long long context_stride;
  TransformBranch branch[2];
  PartialContext partial;  // of merging_transform_forward, which computes the context from it
  Prefetches prefetches;
};

struct TransformGradients {
  int hidden;
  Companion w1;  // as in TransformBranch, and so are the next three
  Companion norm_weight;
  Companion norm_bias;
  Companion w2;
  const void* normalized;         // A [N, P] of the forward pass
  const void* inverse_deviation;  // A [N]    of the forward pass
  const void* grad_out;           // A [N, C]
  Gate gate;                      // that the output went through
  const void* gate_out;           // A [N, C] the output of the gate, or null without a gate
  CompanionOut grad_w1;           // like w1 out, or null, and so are the next five
  CompanionOut grad_b1;
  CompanionOut grad_norm_weight;
  CompanionOut grad_norm_bias;
  CompanionOut grad_w2;
  CompanionOut grad_b2;
  void* partial_y;        // A [slabs_down of W2, N, P] workspace
  void* grad_y;           // A [N, P]                   workspace
  void* grad_hidden;      // A [N, P]                   workspace
  void* partial_context;  // A [slabs_down of W1, N, C] workspace
};

// The partial sums over pixels that merging_transform_backward adds up in place of each branch's grad_out.
struct PartialGradients {
  int splits;           // of an image
  const void* sums[2];  // A [N, splits, C] of each branch
};

struct TransformBackwardArgs {
  static constexpr bool kNormalized = false;  // see tail_backward_args.h
  PhaseGrid grid;
  unsigned* counters;  // [kPhaseCounters, then slabs_across of W1], 0 before and after
  int images, channels, branches;
  const void* context;  // A, image n's [C] from n * context_stride on
  long long context_stride;
  double factor;  // of grad_context
  Activation activation;
  void* grad_context;  // A [N, C] out, or null
  CompanionOut zero;   // one element out, or null: the gradient of the mask's bias, whose shift the softmax ignores
  TransformGradients branch[2];
  Prefetches prefetches;
  PartialGradients partial;  // of merging_transform_backward
};

}  // namespace gc
