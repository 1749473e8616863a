// What the forward and the backward kernel of the transform share.
#pragma once

#include "phases.h"
#include "tile.h"
#include "transform_geometry.h"

namespace gc {

// y = relu(norm_weight * normalized + norm_bias); a NaN stays one, as in PyTorch.
template <typename A>
GC_DEVICE A activate(A normalized, A norm_weight, A norm_bias) {
  const A v = norm_weight * normalized + norm_bias;
  return v < A(0) ? A(0) : v;
}

template <typename A>
GC_DEVICE A warp_sum(A value) {
  GC_UNROLL
  for (int mask = 1; mask < kWarp; mask <<= 1) value += port::shuffle_xor(value, mask);
  return value;
}

}  // namespace gc
