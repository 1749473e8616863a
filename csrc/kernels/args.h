// What each kernel takes: plain pointers and sizes, filled in by the launch side, which knows types and layouts.
// T is the feature map's element type, A the accumulation type (float; double for double).
#pragma once

#include "geometry.h"

namespace gc {

// A small vector in T or, for mixed precision, in A. `data` is null where the vector is absent.
struct Companion {
  const void* data;
  bool wide;  // A
};
struct CompanionOut {
  void* data;
  bool wide;  // A
};

enum class Weighting : int { kMask, kLogits, kUniform };

struct PoolForwardArgs {
  Walk walk;
  const void* x;           // T [N, C, S] or [N, S, C]
  Companion mask_weight;   // [C]              kMask
  Companion mask_bias;     // [1] or absent    kMask
  Companion given_logits;  // [N, S]           kLogits
  double factor;           //                  kUniform
  void* logits;            // A [N, S]     out, kMask
  void* context;           // T [N, C]     out
  void* state;             // A [N, C + 2] out, but kUniform
  void* partial_context;   // A [N, splits, C]         workspace, splits > 1
  void* partial_stats;     // A [N, chunks, splits, 2] workspace, splits > 1, but kUniform
  unsigned* tickets;       // [N, chunks], 0 before and after; splits > 1
};

struct PoolBackwardArgs {
  Walk walk;
  const void* x;             // T [N, C, S] or [N, S, C]
  Companion grad_context;    // [N, C]
  Companion mask_weight;     // [C]      with a mask
  Companion logits;          // [N, S]
  const void* state;         // A [N, C + 2] of the forward pass
  const void* dots;          // A [N, S], or null: computed here
  void* grad_x;              // T like x out
  CompanionOut grad_logits;  // [N, S]   out, without a mask
  CompanionOut grad_weight;  // [C]      out, with a mask
  void* partial_weight;      // A [N, splits, C] workspace, with a mask
  void* image_weight;        // A [N, C]         workspace, with a mask
  unsigned* tickets;         // [N, chunks] then [chunks], 0 before and after; with a mask
};

struct PixelDotArgs {
  Walk walk;
  const void* x;           // T [N, C, S] or [N, S, C]
  Companion vector;        // [N, C], or [C] with image_stride 0
  long long image_stride;  // from one image's vector to the next: C or 0
  Companion bias;          // [1] or absent
  void* dots;              // A [N, S] out
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
  Companion scale;          // [N, C]
  void* grad_x;             // T like grad out
  CompanionOut grad_scale;  // [N, C]      out
  CompanionOut grad_term;   // [N, C]      out
  void* partial_sums;       // A [2, N, splits, C] workspace, splits > 1
  unsigned* tickets;        // [N, chunks], 0 before and after; splits > 1
};

}  // namespace gc
