// The sizes by which the transform's kernels cut their work: shared with the host's launch plans.
#pragma once

#include "geometry.h"

namespace gc {

inline constexpr int kTransformThreads = 256;
inline constexpr int kTransformWarps = kTransformThreads / kWarp;

// Forward: a warp multiplies kTileRows rows of a weight matrix with up to this many images' vectors at a time, so that
// what it fetches of either is used several times.
inline constexpr int kTileRows = 4;
inline constexpr int kFewImages = 2;
inline constexpr int kManyImages = 8;
static_assert(kTileRows * kManyImages == kWarp, "a sum a lane");

// Tiles of all rows and all images, of which a block takes kTransformWarps / shares times kTileRows rows by
// tile_images images: `shares` warps share the length of a row.
GC_BOTH int row_tiles(int rows, int shares) {
  const int rows_in_tile = kTileRows * (kTransformWarps / shares);
  return (rows + rows_in_tile - 1) / rows_in_tile;
}
GC_BOTH int image_tiles(int images, int tile_images) { return (images + tile_images - 1) / tile_images; }

// Backward: a weight matrix is cut into slabs of rows. A warp takes kSlabRows of them at a time, a block kSlabStep.
inline constexpr int kSlabImages = 8;  // at a time
inline constexpr int kSlabRows = 4;
inline constexpr int kSlabStep = kSlabRows * kTransformWarps;
inline constexpr int kMaxSlabSteps = 4;
// Shared memory beside the staged gradients: the warps' sums over rows, and behind them two areas for sums over images.
inline constexpr int kSlabSums = kTransformWarps * kSlabImages * kWarp;
inline constexpr int kSlabScratch = kSlabSums + 2 * kTransformThreads;
// The least images whose gradients of a weight are added one after the other.
inline constexpr int kSlabBlock = 8 * kSlabImages;
// The sums over the blocks before lie in registers, but for the highest slabs, which leave none for them: in shared
// memory, each thread's own.
GC_BOTH int slab_totals(int steps) { return steps < kMaxSlabSteps ? 0 : steps * kSlabRows * kTransformThreads; }

// Sums of many terms are made in two levels, of blocks of this many terms: about the root of `count`, so that no chain
// of additions is longer and rounding errors hardly grow with the number of terms. A multiple of `least`, which like
// this is a power of two.
GC_BOTH int block_of_terms(int count, int least) {
  long long block = least;
  while (block * block < count) block *= 2;
  return static_cast<int>(block);
}

}  // namespace gc
