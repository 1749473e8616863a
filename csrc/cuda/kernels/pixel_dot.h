// One dot product over the channels for every pixel:
//
//   dots[n, s] = vector[n] . (x[n, :, s] - offset[n]) + bias
//
// The forward pass makes its logits with this, without an offset; the backward pass makes the gradients of its
// attention, with the context as the offset. Both do so only for feature maps with too many channels for a block's
// registers: the pooling kernels then take the dot products as given.
//
// With a norm (normalized_pool.h) it is vector[n] . (slope * (x[n, :, s] - mean - offset[n]) + norm_bias) + bias.
//
// vector [N or 1, C], offset [N, C], x [N, C, S] or [N, S, C].
//
// Decomposition: block image * splits + split walks the tiles of its split, and for each tile the chunks of channels.
//
// Moves: x once (N*C*S elements), writes N*S values of the accumulation type.
#pragma once

#include "args.h"
#include "traits.h"

namespace gc {

struct PixelDotTraits : KernelTraits {
  using Args = PixelDotArgs;
  static constexpr KernelKind kKind = KernelKind::kPixelDot;
  static constexpr const char* kName = "pixel_dot";
  static constexpr bool kWalksChunks = true;
  static constexpr int kWaves = 4;

  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk&, bool) {
    arena.take<A>(2 * tile.over_channels(tile.thread_pixels));  // dots
  }
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "tile.h"

namespace gc {

template <typename T, Layout kLayout, int kRows, int kWidth, typename Traits>
GC_KERNEL(kMaxThreads, 1)
pixel_dot(const typename Traits::Args args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;
  static_assert(has_tile<Traits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");

  typename TileT::Map map(args.walk);
  const T* const x = static_cast<const T*>(args.x) + map.image0();
  const long long vector0 = map.image * args.image_stride;
  const A* const offset =
      args.offset != nullptr ? static_cast<const A*>(args.offset) + map.image * args.offset_stride : nullptr;
  const A bias = args.bias.data != nullptr ? read<T>(args.bias, 0) : A(0);

  port::SharedArena arena;
  const int dot_count = over_channels_scratch(kLayout, map.shape, kPixels);
  const ScratchInTurn<A> dots{arena.take<A>(2 * dot_count), dot_count};

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    A dot[kPixels];
    GC_UNROLL
    for (int p = 0; p < kPixels; ++p) dot[p] = 0;
    for (map.channel0 = 0; map.channel0 < map.channels; map.channel0 += map.tile_channels()) {
      TileT tile;
      tile.load(x, map, pixel0);
      A chunk_dot[kPixels];  // added up by itself: the chains of additions stay short
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) chunk_dot[p] = 0;
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const bool inside = map.channel(c) < map.channels;
        A weight = inside ? read<T>(args.vector, vector0 + map.channel(c)) : A(0);
        [[maybe_unused]] A mean = 0;
        [[maybe_unused]] A shift = 0;
        if constexpr (Traits::kNormalized) {
          if (inside) {
            shift = weight * bias_at<T>(args.norm, map.channel(c));
            weight *= slope_at<T>(args.norm, map.channel(c));
            mean = mean_at<T>(args.norm, map.channel(c));
          }
        }
        const A zero = inside && offset != nullptr ? offset[map.channel(c)] : A(0);
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) {
          if constexpr (Traits::kNormalized) {
            chunk_dot[p] += weight * (tile(c, p) - mean - zero) + shift;
          } else {
            chunk_dot[p] += weight * (tile(c, p) - zero);
          }
        }
      }
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) dot[p] += chunk_dot[p];
    }
    A* const scratch = dots.of_tile(tile_index);
    OverChannels<kLayout, kPixels>::publish(map, dot, scratch);
    port::sync_block<kSyncPixelDot>();
    OverChannels<kLayout, kPixels>::collect(map, dot, scratch);
    if (map.channel_thread() == 0) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int pixel = map.pixel(pixel0, p);
        if (pixel < map.pixels) static_cast<A*>(args.dots)[map.pixels0() + pixel] = dot[p] + bias;
      }
    }
  }
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
