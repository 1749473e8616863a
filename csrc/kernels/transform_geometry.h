// The sizes by which the transform's kernels cut their work: shared with the host's launch plans.
#pragma once

#include "geometry.h"

namespace gc {

inline constexpr int kTransformThreads = 256;
inline constexpr int kTransformWarps = kTransformThreads / kWarp;

// Forward: how many images share one fetch of a weight, with a sum for each in registers.
inline constexpr int kFewImages = 4;
inline constexpr int kManyImages = 16;
// Whose hidden units lie in a block's shared memory together.
inline constexpr int kImagesAtOnce = 2 * kManyImages;

// Backward: a weight matrix is cut into slabs of rows. A warp takes kSlabRows of them at a time, a block kSlabStep.
inline constexpr int kSlabImages = 8;  // at a time
inline constexpr int kSlabRows = 4;
inline constexpr int kSlabStep = kSlabRows * kTransformWarps;
inline constexpr int kMaxSlabSteps = 4;

}  // namespace gc
