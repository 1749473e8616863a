// What a launch plan asks of a kernel. The header of each kernel answers in a struct of traits for every kind of its
// launches; the kernel, its plan and its launch read the facts there and nowhere else.
#pragma once

#include "geometry.h"
#include "paths.h"

namespace gc {

enum class KernelKind : int {
  kPoolMask,            // pool_forward, logits from the mask weights
  kPoolLogits,          // pool_forward, logits given
  kPoolUniform,         // pool_forward, the sum or the mean
  kPoolBackwardMask,    // pool_backward with a weight gradient
  kPoolBackwardLogits,  // pool_backward with a gradient for given logits
  kPoolBackwardBlock,   // pool_backward of a whole block
  kPixelDot,
  kBroadcast,
  kBroadcastMulBackward,
  // Of the residual tail. The first four take x = slope (y - mean) + bias from y.
  kPoolMaskNormalized,
  kPoolLogitsNormalized,
  kPoolUniformNormalized,
  kPixelDotNormalized,
  kResidual,
  kStatistics,
  kResidualSums,
  kGradY,
  kPoolBackwardNormalized,  // pool_backward with a mask, of a map that batch normalization is still to come over
};
inline constexpr int kKernelKinds = 18;

// Whose partial results a kernel merges, see split_merge.h.
enum class Merge : int {
  kNone,
  kImage,    // those of the splits of an image, where it has several
  kAll,      // those of the splits of all images
  kByImage,  // the same, but first those of an image
};

// With Path::kLateMerge, so many splits at most leave their partial results to the forward pass's transform, and to the
// backward pass's (late_merge.h).
inline constexpr int kMostLateSplits = 256;
inline constexpr int kMostGatheredSplits = 64;

// A tile for a block that must hold all channels of a pixel, in NCHW.
struct TileChoice {
  int rows;       // vectors a thread holds
  int threads;    // of the block
  int row_bytes;  // the least length of the tile's rows, if the map's rows are as long
};
// 32 contiguous bytes at a time reach 51 % of the streaming rate of an H100, 128 bytes reach 93 %.
inline constexpr int kLongRow = 128;
inline constexpr int kFairRow = 64;

// A view of an array of them, in order of preference.
struct TileChoices {
  const TileChoice* first = nullptr;
  int count = 0;

  constexpr TileChoices() = default;
  template <int kCount>
  GC_BOTH TileChoices(const TileChoice (&choices)[kCount]) : first(choices), count(kCount) {}
  GC_BOTH const TileChoice* begin() const { return first; }
  GC_BOTH const TileChoice* end() const { return first + count; }
};

// What a multiprocessor has for the threads that it holds at once, on every architecture: registers, in four equal
// parts of which a warp takes from one, as many for each of its threads as a multiple of eight.
inline constexpr int kRegisters = 65536;
inline constexpr int kRegisterParts = 4;
// A thread's, where a kernel is compiled for blocks of kMaxThreads and nothing else. And with Path::kFullMachine, for
// four blocks of 256 threads to be resident at once, or for three where four would spill.
inline constexpr int kRegistersOfThread = 128;
inline constexpr int kFullMachineRegisters = 64;
inline constexpr int kMoreRegisters = 80;

// Blocks that a multiprocessor's registers have room for.
GC_BOTH int resident_blocks(int threads, int registers) {
  const int warps = kRegisters / kRegisterParts / (registers * kWarp) * kRegisterParts;
  return warps / (threads / kWarp);
}

// The facts of a kernel that has nothing special. The traits of a kind derive from this and restate what differs; all
// have kKind and kName.
struct KernelTraits {
  // The newer paths that its instantiations go. A plan chooses among those of one kind.
  static constexpr Paths kPaths = {};
  // Those of the newer paths that take no instantiation of their own: the plan says to the launch or to the kernel
  // whether it takes them. With Path::kEarlyStart, every thread waits for the launch before as its first access to
  // memory.
  static constexpr Paths kPlannedPaths = {};
  // The least bytes of an access that they make sense for.
  static constexpr int kLeastAccess = 1;
  // What a kernel is compiled for: threads of a block, and registers of a thread.
  static constexpr int kMostThreads = kMaxThreads;
  static GC_BOTH int registers(int /*element_bytes*/) { return kRegistersOfThread; }
  // Vectors that a thread holds of each feature map, and the same for the tall tiles, or 0.
  static constexpr int kRows = 8;
  static constexpr int kTallRows = 0;
  // A block needs all channels of a pixel, for their dot product, unless pixel_dot has computed that. Then choices()
  // has the tiles to choose from in NCHW.
  static constexpr bool kWholeChannels = false;
  static GC_BOTH TileChoices choices(int /*element_bytes*/) { return {}; }
  // A block walks over the chunks of channels itself: the grid has one of them.
  static constexpr bool kWalksChunks = false;
  // Waves of blocks that fill the device one after the other, as far as there are tiles. One where a block costs
  // something beyond its tiles: vectors to stage, partial results to leave. Several waves even out the end.
  static constexpr int kWaves = 1;
  // A pass over x has gone before: see Walk.
  static constexpr bool kBackwards = false;
  // What is merged. A partial result has so many vectors over the channels, and so many values a chunk besides.
  static constexpr Merge kMerge = Merge::kNone;
  // Up to so many, one block merges them all: a second round costs about as much as reading so many.
  static constexpr int kMergedAtOnce = 8;
  static constexpr int kPartialVectors = 0;
  static constexpr int kPartialValues = 0;
  // The kernel's flat form, for images as one contiguous range: vectors that a thread holds, or 0 without such a form.
  static constexpr int kFlatRows = 0;
  // It has no other form.
  static constexpr bool kFlatOnly = false;
  // Path::kFullMachine, where it is among kPaths.
  static constexpr bool kFullMachine = false;
  // The same of Path::kNeighbours, which only loads of less than a vector can take.
  static constexpr bool kNeighbours = false;
  // It takes a map x = slope (y - mean) + bias from y (tail_args.h).
  static constexpr bool kNormalized = false;
  // Takes what the kernel takes of shared memory: in the same order, and with the same counts. Every launch of the host
  // tests compares the two sums. A: the accumulation type. dots_given: by pixel_dot.
  template <typename A>
  static GC_BOTH void take_shared(CountingArena&, const BlockTile&, const Walk&, bool /*dots_given*/) {}
};

// Tall tiles hold as many channels in fewer threads, which makes the rows of an NCHW tile longer. They exist for
// float32 only: what a thread computes from so many vectors of another type does not fit its registers.
template <typename Traits>
GC_BOTH bool has_tall_tiles(Layout layout, int element_bytes) {
  return Traits::kTallRows > 0 && layout == Layout::kNCHW && element_bytes == 4;
}

// Are a block's tiles those of PlannedBlock (tile.h)? The splits of the others are cut as they were measured.
template <typename Traits>
GC_BOTH bool has_planned_walk() {
  return !(Traits::kPaths == Paths{});
}

// Is there an instantiation of the kernel for loads of so many of the elements of a vector?
template <typename Traits>
GC_BOTH bool has_width(int width, int elements) {
  const bool wide_enough = width * kVectorBytes / elements >= Traits::kLeastAccess;
  return wide_enough && (!Traits::kNeighbours || width < elements);
}

// Is there an instantiation of the kernel for tiles of this height?
template <typename Traits>
GC_BOTH bool has_tile(int rows, Layout layout, int element_bytes) {
  return rows == Traits::kRows || (rows == Traits::kTallRows && has_tall_tiles<Traits>(layout, element_bytes));
}

}  // namespace gc
