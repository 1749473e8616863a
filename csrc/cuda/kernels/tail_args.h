// What the kernels of the residual tail take (csrc/ops/tail.h), as in args.h.
#pragma once

#include "args.h"

namespace gc {

// Batch normalization, x = slope (y - mean) + bias with slope = weight inverse_std. Where the variance is given, it is
// read in place of inverse_std. What is absent is exactly 0 (mean, bias) or 1 (inverse_std, weight): x is y without any.
struct NormArgs {
  Companion mean;         // [C]
  Companion inverse_std;  // [C]
  Companion variance;     // [C]
  Companion weight;       // [C]
  Companion bias;         // [C]
  double eps;             // beside the variance
};

// The same in the accumulation type, as the backward pass takes it: what was given may change until then.
struct KeptNorm {
  void *mean, *inverse_std, *variance, *bias;  // A [C] out, or all null
};

struct NormalizedPoolArgs : PoolForwardArgs {  // x: y; state: of y - mean; no context
  NormArgs norm;
  void* state_of_x;  // A [N, C + 2] out, beside state: the context of x
};

struct NormalizedPixelDotArgs : PixelDotArgs {
  NormArgs norm;
};

struct StatisticsArgs {
  Walk walk;
  const void* y;  // T [N, C, S] or [N, S, C]
  double eps;
  Companion weight, bias;                       // [C], or absent: of the norm
  KeptNorm kept;                                // out; the variance without bias
  CompanionOut running_mean, running_variance;  // [C], read and written, or null
  double momentum;
  void* state;        // A [N, C + 2] out, or null: of uniform pooling of y - mean
  void* state_of_x;   // A [N, C + 2] out, beside state: the context of x
  void* partials;     // A [rows_by_image(..), 3, C] workspace
  unsigned* tickets;  // [chunks, tickets_by_image(..)], 0 before and after
};

struct ResidualArgs {
  Walk walk;
  const void* y;         // T [N, C, S] or [N, S, C]
  const void* identity;  // T like y, or null
  NormArgs norm;
  const void* scale;  // A [N, C], or null
  const void* term;   // A [N, C], or null
  bool relu;
  void* out;      // T like y
  KeptNorm kept;  // out
};

}  // namespace gc
