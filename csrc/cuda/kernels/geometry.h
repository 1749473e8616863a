// How a block's threads and registers are laid over a feature map: shared by the kernels and by the host's launch
// plans. README.md says what each word for a piece of work means.
//
// A tile is rows x contiguous elements. In NCHW a row is a channel and the elements are its pixels; in NHWC
// (channels_last) a row is a pixel and the elements are its channels. A thread keeps `rows` vectors of 16 bytes, so
// with E elements to a vector it holds rows x E values in registers:
//
//            contiguous ->  fast_threads x E elements
//   rows     +------------------------------------+
//   |        | thread (fast 0, slow 0) | (1, 0) ..|   row r of a thread lies r * slow_threads further down
//   v        | thread (0, 1)           | (1, 1) ..|
//            +------------------------------------+
#pragma once

// GC_SHARED: of a Shared that a plan makes on the host, which nvcc need not compile for it.
#if defined(__CUDACC__)
#define GC_BOTH __host__ __device__ constexpr
#define GC_SHARED __device__ __forceinline__
#else
#define GC_BOTH constexpr
#define GC_SHARED inline
#endif

// Kernels' headers are included where there is no CUDA toolkit, too: plans read the facts in them. What only compiles
// for a GPU, or for the tests that run kernels on the CPU, stands behind this.
#if defined(__CUDACC__) || defined(GC_HOST_RUN)
#define GC_DEVICE_CODE
#endif

namespace gc {

enum class Layout : int { kNCHW, kNHWC };

inline constexpr int kWarp = 32;
inline constexpr int kVectorBytes = 16;
inline constexpr int kMaxThreads = 512;

struct TileShape {
  int fast_threads;  // along the contiguous dimension; a power of two
  int slow_threads;  // across rows; a power of two; fast_threads * slow_threads is a multiple of the warp
};

// The work of a launch: every image's pixels in `splits` ranges of whole tiles, every tile's channels in chunks.
// Block (image * splits + split, chunk) takes one split of one chunk. All splits but the last have tiles_per_split
// tiles; where the plan took a newer path with a walk of its own (traits.h), the first `longer` of them have one more,
// and the others tiles_per_split. With `backwards`, the first blocks to run take the last images, which a pass over x
// just before has left in the second-level cache. With `merged_later`, the partial results of the splits are for
// another launch to merge (late_merge.h), and `group` has all of an image's.
struct Walk {
  int images, channels, pixels;
  int splits, tiles_per_split;
  int group;  // of partial results, see split_merge.h
  bool backwards;
  // What newer paths need lies in the gaps of what was measured, whose arguments stay where they were.
  unsigned char merged_later : 1;
  unsigned char fast_shift : 7;  // fast_threads = 1 << fast_shift; such paths do not divide before they load
  unsigned short longer;
  TileShape shape;
  unsigned reciprocal;  // of splits, times 2^32: rounded down, and less than 2^32
};
static_assert(sizeof(Walk) == 40, "other arguments would move, and with them the registers of sm_100's kernels");

GC_BOTH bool channels_are_fast(Layout layout) { return layout == Layout::kNHWC; }

// The two thread axes as mathematics sees them: a thread shares its pixels with the other channel threads, its channels
// with the other pixel threads.
GC_BOTH int channel_threads(Layout layout, TileShape shape) {
  return channels_are_fast(layout) ? shape.fast_threads : shape.slow_threads;
}
GC_BOTH int pixel_threads(Layout layout, TileShape shape) {
  return channels_are_fast(layout) ? shape.slow_threads : shape.fast_threads;
}

// A reduction over one axis is finished inside each warp by shuffles. This many values for each kept index remain.
GC_BOTH int axis_slots(bool over_fast, TileShape shape) {
  if (over_fast) return shape.fast_threads > kWarp ? shape.fast_threads / kWarp : 1;
  const int warps = shape.fast_threads * shape.slow_threads / kWarp;
  return shape.slow_threads < warps ? shape.slow_threads : warps;
}

// Elements of scratch for a reduction of `count` values a thread over one axis.
GC_BOTH int axis_scratch(bool over_fast, TileShape shape, int count) {
  return axis_slots(over_fast, shape) * (over_fast ? shape.slow_threads : shape.fast_threads) * count;
}

// The same for a reduction over the channel threads, and over the pixel threads.
GC_BOTH int over_channels_scratch(Layout layout, TileShape shape, int count) {
  return axis_scratch(channels_are_fast(layout), shape, count);
}
GC_BOTH int over_pixels_scratch(Layout layout, TileShape shape, int count) {
  return axis_scratch(!channels_are_fast(layout), shape, count);
}

// A block's tile, in channels and pixels.
struct BlockTile {
  Layout layout;
  TileShape shape;
  int thread_channels, thread_pixels;  // what one thread holds

  GC_BOTH int rows() const { return channels_are_fast(layout) ? thread_pixels : thread_channels; }
  GC_BOTH int threads() const { return shape.fast_threads * shape.slow_threads; }
  GC_BOTH int channels() const { return thread_channels * channel_threads(layout, shape); }
  GC_BOTH int pixels() const { return thread_pixels * pixel_threads(layout, shape); }
  GC_BOTH int over_channels(int count) const { return over_channels_scratch(layout, shape, count); }
  GC_BOTH int over_pixels(int count) const { return over_pixels_scratch(layout, shape, count); }
};

// `rows` vectors of `elements` a thread.
GC_BOTH BlockTile block_tile(Layout layout, TileShape shape, int rows, int elements) {
  return channels_are_fast(layout) ? BlockTile{layout, shape, elements, rows}
                                   : BlockTile{layout, shape, rows, elements};
}

// `partials` partial results of different blocks become one in two rounds (split_merge.h). Each `group` of them leaves
// a partial result of its own, in a row after theirs, unless it is the only group.
GC_BOTH int groups_of(int partials, int group) { return (partials + group - 1) / group; }
GC_BOTH int merged_rows(int partials, int group) {
  return partials > group ? partials + groups_of(partials, group) : partials;
}
GC_BOTH int merged_at_most(int partials, int group) {  // in one round
  return groups_of(partials, group) > group ? groups_of(partials, group) : group;
}
GC_BOTH int merge_tickets(int partials, int group) { return partials > group ? groups_of(partials, group) + 1 : 1; }

// The same where no group has splits of two images: each image's are merged in groups, and then all that this leaves.
// With groups of one, the first round is left out.
GC_BOTH int groups_by_image(int images, int splits, int group) { return images * groups_of(splits, group); }
GC_BOTH int rows_by_image(int images, int splits, int group) {
  return images * splits + (group > 1 ? groups_by_image(images, splits, group) : 0);
}
GC_BOTH int tickets_by_image(int images, int splits, int group) {
  return group > 1 ? groups_by_image(images, splits, group) + 1 : 1;
}

// Elements of shared memory that a thread takes for `vectors` interleaved vectors over its channels. Several vectors
// are followed by a gap of 16 bytes: without it, those of neighbouring threads would begin in the same banks.
GC_BOTH int staged_elements(int channels, int vectors, int element_bytes) {
  return channels * vectors + (vectors > 1 ? kVectorBytes / element_bytes : 0);
}

// A vector of a tile in shared memory; and the least bytes that a copy there moves while the thread goes on.
struct alignas(kVectorBytes) VectorPlace {};
inline constexpr int kLeastStaged = 4;

// Stands for a block's shared memory (port::SharedArena) in a plan, and only counts: a kernel's traits take the same
// arrays from it as the kernel.
class CountingArena {
 public:
  template <typename T>
  GC_BOTH T* take(int count) {
    bytes_ += (count * static_cast<int>(sizeof(T)) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return nullptr;
  }
  GC_BOTH int bytes() const { return bytes_; }

 private:
  int bytes_ = 0;
};

}  // namespace gc
