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

}  // namespace gc
