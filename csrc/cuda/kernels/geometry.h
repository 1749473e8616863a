// How a block's threads and registers are laid over a feature map: shared by the kernels and by the host's launch
// plans.
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

#if defined(__CUDACC__)
#define GC_BOTH __host__ __device__ constexpr
#define GC_SHARED __device__ __forceinline__
#else
#define GC_BOTH constexpr
#define GC_SHARED \
  inline  // of a kernel's Shared: its plan constructs that on the host, nvcc compiles it for the GPU only
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
// Block (image * splits + split, chunk); backwards, the first blocks to run take the last images, which a pass over x
// just before has left in the second-level cache.
struct Walk {
  int images, channels, pixels;
  int splits, tiles_per_split;
  int group;  // of partial results, see split_merge.h
  bool backwards;
  TileShape shape;
};

// The two thread axes seen from the mathematics: who shares a pixel, who shares a channel.
GC_BOTH bool channels_are_fast(Layout layout) { return layout == Layout::kNHWC; }

GC_BOTH int channel_threads(Layout layout, TileShape shape) {
  return channels_are_fast(layout) ? shape.fast_threads : shape.slow_threads;
}
GC_BOTH int pixel_threads(Layout layout, TileShape shape) {
  return channels_are_fast(layout) ? shape.slow_threads : shape.fast_threads;
}

// `parts` partial results of different blocks become one in two rounds (split_merge.h): each `group` of them leaves a
// partial result of its own behind them, unless it is the only one.
GC_BOTH int groups_of(int parts, int group) { return (parts + group - 1) / group; }
GC_BOTH int merged_rows(int parts, int group) { return parts > group ? parts + groups_of(parts, group) : parts; }
GC_BOTH int merged_at_most(int parts, int group) {  // in one round
  return groups_of(parts, group) > group ? groups_of(parts, group) : group;
}
GC_BOTH int merge_tickets(int parts, int group) { return parts > group ? groups_of(parts, group) + 1 : 1; }

// A reduction over one axis is finished inside each warp by shuffles; what is left are this many values a kept index.
GC_BOTH int axis_slots(bool over_fast, TileShape shape) {
  if (over_fast) return shape.fast_threads > kWarp ? shape.fast_threads / kWarp : 1;
  const int warps = shape.fast_threads * shape.slow_threads / kWarp;
  return shape.slow_threads < warps ? shape.slow_threads : warps;
}

// Elements of scratch for a reduction of `count` values a thread over one axis.
GC_BOTH int axis_scratch(bool over_fast, TileShape shape, int count) {
  return axis_slots(over_fast, shape) * (over_fast ? shape.slow_threads : shape.fast_threads) * count;
}

// The same by meaning: for a reduction over the channel threads, and over the pixel threads.
GC_BOTH int over_channels_scratch(Layout layout, TileShape shape, int count) {
  return axis_scratch(channels_are_fast(layout), shape, count);
}
GC_BOTH int over_pixels_scratch(Layout layout, TileShape shape, int count) {
  return axis_scratch(!channels_are_fast(layout), shape, count);
}

// Elements of shared memory for a thread's share of `vectors` interleaved vectors over the channels. Runs of several
// vectors end in a gap of 16 bytes: without it those of neighbouring threads would begin in the same banks.
GC_BOTH int staged_run(int channels, int vectors, int element_bytes) {
  return channels * vectors + (vectors > 1 ? kVectorBytes / element_bytes : 0);
}

// Stands for the block's shared memory (port::SharedArena) on the host, and only counts. A kernel's Shared takes the same
// arrays from either, so that a plan's number of bytes is the kernel's own.
class CountingArena {
 public:
  template <typename T>
  constexpr T* take(int count) {
    bytes_ += (count * static_cast<int>(sizeof(T)) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return nullptr;
  }
  constexpr int bytes() const { return bytes_; }

 private:
  int bytes_ = 0;
};

}  // namespace gc
