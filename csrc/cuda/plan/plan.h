// Launch plans: what the CUDA kernels are launched with, computed on the host into an object that can be printed and
// tested without a GPU. What differs from kernel to kernel stands in the traits of its header (kernels/traits.h). Plans
// know neither torch nor the CUDA runtime: every build has them.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/kernels/traits.h"
#include "cuda/plan/paths.h"

namespace gc {

enum class ElementType : int { kFloat, kHalf, kBFloat16, kDouble };

int element_bytes(ElementType type);
int accumulation_bytes(ElementType type);

// The names used in to_string() and by Python: "pool_mask", "float32", "NCHW" ...
const char* name_of(KernelKind kind);
const char* name_of(ElementType type);
const char* name_of(Layout layout);

struct Problem {
  int64_t images;
  int64_t channels;
  int64_t pixels;
  Layout layout;
  ElementType type;
  int alignment = kVectorBytes;  // in bytes, that every feature map's address is a multiple of
};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // that a block can opt in to
  Paths paths = {};  // that are switched on
  // Of an image at most, whose partial results another launch merges, with Path::kLateMerge.
  int late_splits = kMostLateSplits;
};

// Bytes of shared memory that a launch may have without asking for it.
inline constexpr int kSharedWithoutAsking = 48 * 1024;

struct Plan {
  KernelKind kind;
  ElementType type;
  Layout layout;
  int rows;     // vectors a thread holds of a feature map
  int width;    // elements moved by one load or store
  Paths paths;  // those that it takes; kEarlyStart not where the launch is its operator's first
  Walk walk;
  int chunks;           // of channels
  int resident;         // blocks that a multiprocessor is counted on to hold at once
  bool flat;            // the kernel's flat form: an image as one contiguous range; a tile is `rows` vectors a thread
  bool holds_channels;  // false: this kernel needs a pixel's dot product over all channels, and a block holds too few;
                        // run kPixelDot first and plan with dots_given
  int shared_bytes;     // dynamic shared memory of a block
  int64_t workspace;    // elements of the accumulation type for partial results; 0: none
  int64_t tickets;      // counters; 0: none

  int threads() const { return walk.shape.fast_threads * walk.shape.slow_threads; }
  BlockTile tile() const;
  int tile_channels() const { return tile().channels(); }
  int tile_pixels() const { return tile().pixels(); }
  int64_t grid_x() const { return static_cast<int64_t>(walk.images) * walk.splits; }
  int grid_y() const { return chunks; }
  // One line, e.g. "pool_mask float32 NCHW 2x512x16800: 16 rows x 4, 8x32 threads, 132 splits of 4 tiles, ..."
  std::string to_string() const;
};

// Throws std::invalid_argument, with the limit and what was asked, when the problem is larger than a launch can be.
// dots_given: the dot products over the channels come from kPixelDot (pooling with logits given, backward with dots).
Plan make_plan(KernelKind kind, const Problem& problem, const DeviceLimits& device, bool dots_given = false);

}  // namespace gc
