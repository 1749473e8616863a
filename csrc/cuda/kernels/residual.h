// The last step of the residual tail, one launch:
//
//   out[n, c, s] = relu(slope[c] * (y[n, c, s] - mean[c]) * scale[n, c] + (bias[c] * scale[n, c] + term[n, c])
//                       + identity[n, c, s])
//
// y, identity, out [N, C, S] or [N, S, C]; the norm [C]; scale, term [N, C]. All but y may be absent, and the ReLU too.
// The mean is subtracted first: where it is far larger than the deviations from it, slope * y - slope * mean cancels.
//
// Decomposition: as broadcast's. Block (image * splits + split, chunk) walks the tiles of its split for its chunk of
// channels; in NCHW where rows are not whole vectors but images are, a block takes a range of the image as it lies.
//
// Where statistics are given, no launch before this one is sure to see every channel: this one also writes what the
// backward pass keeps of the norm, each block some channels.
//
// Moves: y, identity and out once (N*C*S elements each).
#pragma once

#include "tail_args.h"
#include "traits.h"

namespace gc {

struct ResidualTraits : KernelTraits {
  static constexpr KernelKind kKind = KernelKind::kResidual;
  static constexpr const char* kName = "residual";
  static constexpr int kRows = 4;  // of two maps
  static constexpr int kFlatRows = 4;
  static constexpr int kWaves = 4;
  static constexpr bool kBackwards = true;
  static constexpr Paths kPlannedPaths = Path::kEarlyStart;
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "tile.h"

namespace gc {

// What happens to the elements of a channel of an image.
template <typename A>
struct ResidualChannel {
  A mean, slope, shift;

  GC_DEVICE A operator()(A y) const { return (y - mean) * slope + shift; }
};

template <typename T>
GC_DEVICE ResidualChannel<Acc<T>> residual_channel(const ResidualArgs& args, long long channels0, int channel) {
  using A = Acc<T>;
  ResidualChannel<A> of{mean_at<T>(args.norm, channel), slope_at<T>(args.norm, channel),
                        bias_at<T>(args.norm, channel)};
  if (args.scale != nullptr) {
    const A scale = static_cast<const A*>(args.scale)[channels0 + channel];
    of.slope *= scale;
    of.shift *= scale;
  }
  if (args.term != nullptr) of.shift += static_cast<const A*>(args.term)[channels0 + channel];
  return of;
}

// A NaN passes.
template <typename A>
GC_DEVICE A relu_of(A v, bool relu) {
  return relu && v < A(0) ? A(0) : v;
}

// This block's share of the channels.
template <typename T>
GC_DEVICE void keep_norm(const ResidualArgs& args) {
  using A = Acc<T>;
  if (args.kept.mean == nullptr || port::block_y() != 0) return;
  GC_UNROLL_BY(1)
  for (int c = port::block_x() * port::block_threads() + port::thread_index(); c < args.walk.channels;
       c += port::grid_x() * port::block_threads()) {
    static_cast<A*>(args.kept.mean)[c] = mean_at<T>(args.norm, c);
    static_cast<A*>(args.kept.inverse_std)[c] = inverse_std_at<T>(args.norm, c);
    const bool given = args.norm.variance.data != nullptr;
    static_cast<A*>(args.kept.variance)[c] = given ? read<T>(args.norm.variance, c) : A(1);
    static_cast<A*>(args.kept.bias)[c] = bias_at<T>(args.norm, c);
  }
}

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
residual(const ResidualArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  static_assert(has_tile<ResidualTraits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  const typename TileT::Map map(args.walk);
  port::wait_for_launch_before<kWaitResidual>();
  keep_norm<T>(args);

  ResidualChannel<A> of[TileT::kChannels];
  GC_UNROLL
  for (int c = 0; c < TileT::kChannels; ++c) {
    of[c] = {};
    if (map.channel(c) < map.channels) of[c] = residual_channel<T>(args, map.channels0(), map.channel(c));
  }

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT tile;
    TileT identity{};
    tile.load(static_cast<const T*>(args.y) + map.image0(), map, pixel0);
    if (args.identity != nullptr) identity.load(static_cast<const T*>(args.identity) + map.image0(), map, pixel0);
    GC_UNROLL
    for (int c = 0; c < TileT::kChannels; ++c) {
      GC_UNROLL
      for (int p = 0; p < TileT::kPixels; ++p) {
        A v = of[c](tile(c, p));
        if (args.identity != nullptr) v += identity(c, p);
        tile.set(c, p, relu_of(v, args.relu));
      }
    }
    tile.store(static_cast<T*>(args.out) + map.image0(), map, pixel0);
  }
}

// For NCHW where a row is not a multiple of a vector but the image is, as broadcast_flat.
template <typename T, int kRows>
GC_KERNEL(kMaxThreads, 1)
residual_flat(const ResidualArgs args) {
  using A = Acc<T>;
  constexpr int kStep = kElements<T>;
  static_assert(kRows == ResidualTraits::kFlatRows, "no plan has such tiles");
  const Walk& walk = args.walk;
  const int block = walk.backwards ? port::grid_x() - 1 - port::block_x() : port::block_x();
  const int image = block / walk.splits;
  const int first = (block - image * walk.splits) * walk.tiles_per_split;
  const int end = first + walk.tiles_per_split;
  const unsigned elements = static_cast<unsigned>(walk.channels) * walk.pixels;  // below 2^31
  const unsigned pixels = walk.pixels;
  const long long channels0 = static_cast<long long>(image) * walk.channels;
  const T* const y = static_cast<const T*>(args.y) + channels0 * pixels;
  const bool adds = args.identity != nullptr;
  const T* const identity = adds ? static_cast<const T*>(args.identity) + channels0 * pixels : nullptr;
  T* const out = static_cast<T*>(args.out) + channels0 * pixels;
  const unsigned tile_elements = kRows * kStep * port::block_threads();
  port::wait_for_launch_before<kWaitResidualFlat>();
  keep_norm<T>(args);
  for (int tile = first; tile < end; ++tile) {
    const unsigned begin = tile * tile_elements + port::thread_index() * kStep;
    PackedVector<T> rows[kRows];
    PackedVector<T> identity_rows[kRows]{};
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const unsigned at = begin + r * kStep * port::block_threads();
      if (at < elements) rows[r].template load<kStep>(0, y + at);
      if (adds && at < elements) identity_rows[r].template load<kStep>(0, identity + at);
    }
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const unsigned at = begin + r * kStep * port::block_threads();
      if (at >= elements) continue;
      unsigned channel = at / pixels;
      unsigned left = pixels - at % pixels;  // of the channel
      ResidualChannel<A> of = residual_channel<T>(args, channels0, channel);
      GC_UNROLL
      for (int e = 0; e < kStep; ++e) {
        if (left == 0) {
          ++channel;
          left = pixels;
          of = residual_channel<T>(args, channels0, channel);
        }
        --left;
        A v = of(rows[r].get(e));
        if (adds) v += identity_rows[r].get(e);
        rows[r].set(e, relu_of(v, args.relu));
      }
      rows[r].template store<kStep>(0, out + at);
    }
  }
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
