// Giving a value per image and channel back to every pixel, and its backward, one launch each:
//
//   broadcast               out[n, c, s] = x[n, c, s] * scale[n, c] + term[n, c]        (either may be absent)
//   broadcast_mul_backward  grad_x = grad * scale,  grad_scale[n, c] = sum_s grad * x,  grad_term[n, c] = sum_s grad
//
// The backward may leave out grad_x (and then scale), which a whole block's last pass writes, and grad_term.
//
// x, out, grad, grad_x [N, C, S] or [N, S, C]; scale, term [N, C].
//
// Decomposition: block (image * splits + split, chunk) walks the tiles of its pixel range for its chunk of channels.
// The sums of the backward are combined as in pool_forward: in registers, over the block's pixel threads, and over the
// splits in order by the last block of an image and chunk.
//
// Moves: forward x and out once; backward grad, x and grad_x once (N*C*S elements each).
#pragma once

#include "split_merge.h"
#include "tile.h"

namespace gc {

template <typename T, Layout kLayout, int kRows, int kWidth, bool kScale, bool kTerm>
GC_KERNEL(kMaxThreads, 1)
broadcast(const BroadcastArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  const typename TileT::Map map(args.walk);

  A scale[TileT::kChannels];
  A term[TileT::kChannels];
  GC_UNROLL
  for (int c = 0; c < TileT::kChannels; ++c) {
    const int channel = map.channel(c);
    const bool inside = channel < map.channels;
    scale[c] = kScale && inside ? read<T>(args.scale, map.channels0() + channel) : A(0);
    term[c] = kTerm && inside ? read<T>(args.term, map.channels0() + channel) : A(0);
  }

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT tile;
    tile.load(static_cast<const T*>(args.x) + map.image0(), map, pixel0);
    GC_UNROLL
    for (int c = 0; c < TileT::kChannels; ++c) {
      GC_UNROLL
      for (int p = 0; p < TileT::kPixels; ++p) {
        A v = tile(c, p);
        if constexpr (kScale) v *= scale[c];
        if constexpr (kTerm) v += term[c];
        tile.set(c, p, v);
      }
    }
    tile.store(static_cast<T*>(args.out) + map.image0(), map, pixel0);
  }
}

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
broadcast_mul_backward(const BroadcastMulBackwardArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  const typename TileT::Map map(args.walk);

  A scale[kChannels];
  A sums[2 * kChannels];  // of grad * x, then of grad
  GC_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    const bool scaled = args.grad_x != nullptr && map.channel(c) < map.channels;
    scale[c] = scaled ? read<T>(args.scale, map.channels0() + map.channel(c)) : A(0);
    sums[c] = sums[kChannels + c] = 0;
  }

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT grad;
    TileT x;
    grad.load(static_cast<const T*>(args.grad) + map.image0(), map, pixel0);
    x.load(static_cast<const T*>(args.x) + map.image0(), map, pixel0);
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      A product_sum = 0;
      A grad_sum = 0;
      GC_UNROLL
      for (int p = 0; p < TileT::kPixels; ++p) {
        const A g = grad(c, p);
        product_sum += g * x(c, p);
        grad_sum += g;
        grad.set(c, p, g * scale[c]);
      }
      sums[c] += product_sum;
      sums[kChannels + c] += grad_sum;
    }
    if (args.grad_x != nullptr) grad.store(static_cast<T*>(args.grad_x) + map.image0(), map, pixel0);
  }

  port::SharedArena arena;
  A* const scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, 2 * kChannels));
  OverPixels<kLayout, 2 * kChannels>::publish(map, sums, scratch);
  port::sync_block<kSyncGradSum>();
  OverPixels<kLayout, 2 * kChannels>::collect(map, sums, scratch);

  A* const partial_product = static_cast<A*>(args.partial_sums) + map.channels0() * args.walk.splits;
  A* const partial_grad = partial_product + static_cast<long long>(args.walk.images) * args.walk.splits * map.channels;
  if (map.pixel_thread() == 0) {
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const int channel = map.channel(c);
      if (channel >= map.channels) continue;
      if (args.walk.splits == 1) {
        write<T>(args.grad_scale, map.channels0() + channel, sums[c]);
        if (args.grad_term.data != nullptr) write<T>(args.grad_term, map.channels0() + channel, sums[kChannels + c]);
      } else {
        partial_product[map.split * map.channels + channel] = sums[c];
        partial_grad[map.split * map.channels + channel] = sums[kChannels + c];
      }
    }
  }
  if (args.walk.splits == 1) return;
  int* const flag = arena.take<int>(1);
  unsigned* const ticket = args.tickets + map.image_chunk();
  if (!arrive_last(ticket, args.walk.splits, flag)) return;
  const auto plainly = [](int) { return A(1); };
  add_rows(map, partial_product, args.walk.splits, plainly,
           [&](int c, A sum) { write<T>(args.grad_scale, map.channels0() + c, sum); });
  if (args.grad_term.data == nullptr) return;
  add_rows(map, partial_grad, args.walk.splits, plainly,
           [&](int c, A sum) { write<T>(args.grad_term, map.channels0() + c, sum); });
}

}  // namespace gc
