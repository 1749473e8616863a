// dots[n, s] = vector[n] . (x[n, :, s] - offset[n]) + bias: one dot product over the channels for every pixel; without
// an offset for the logits, and with the context for the gradients of attention.
//
// Only for feature maps with too many channels for a block's registers: the pooling kernels then take these as given
// instead of computing them from the registers they already hold. vector [N or 1, C], offset [N, C], x [N, C, S] or [N,
// S, C].
//
// Decomposition: block image * splits + split walks the tiles of its pixel range, and for each tile the chunks of
// channels. Moves: x once (N*C*S elements), writes N*S values of the accumulation type.
#pragma once

#include "tile.h"

namespace gc {

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
pixel_dot(const PixelDotArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;

  typename TileT::Map map(args.walk);
  const T* const x = static_cast<const T*>(args.x) + map.image0();
  const long long vector0 = map.image * args.image_stride;
  const A* const offset =
      args.offset != nullptr ? static_cast<const A*>(args.offset) + map.image * args.offset_stride : nullptr;
  const A bias = args.bias.data != nullptr ? read<T>(args.bias, 0) : A(0);

  port::SharedArena arena;
  const int dot_count = over_channels_scratch(kLayout, map.shape, kPixels);
  A* const dot_scratch = arena.take<A>(2 * dot_count);

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    A dot[kPixels];
    GC_UNROLL
    for (int p = 0; p < kPixels; ++p) dot[p] = 0;
    for (map.channel0 = 0; map.channel0 < map.channels; map.channel0 += map.tile_channels()) {
      TileT tile;
      tile.load(x, map, pixel0);
      A part[kPixels];  // of this chunk: the chains of additions stay short
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) part[p] = 0;
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const bool inside = map.channel(c) < map.channels;
        const A weight = inside ? read<T>(args.vector, vector0 + map.channel(c)) : A(0);
        const A zero = inside && offset != nullptr ? offset[map.channel(c)] : A(0);
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) part[p] += weight * (tile(c, p) - zero);
      }
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) dot[p] += part[p];
    }
    // Two scratch areas in turn: who writes one again has passed the barrier after which nobody reads it.
    A* const scratch = dot_scratch + (tile_index & 1) * dot_count;
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
