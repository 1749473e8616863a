// Backward of softmax pooling, in one launch and one read of x. With gc = grad_context[n] and a = softmax(logits[n]):
//
//   grad_logits[s] = a[s] * (gc . x[:, s] - gc . context)
//   grad_x[:, s]   = a[s] * gc + grad_logits[s] * mask_weight          (the second term with kMask)
//   grad_mask_weight = sum over n, s of grad_logits[s] * x[:, s]       (kMask)
//
// The softmax's inner product sum_s a[s] * (gc . x[:, s]) equals gc . context, which the forward pass has kept: so
// every pixel is on its own. With kLogits, grad_logits is written instead of being folded into grad_x.
//
// Decomposition: as pool_forward; block (image * splits + split, chunk). Usually one chunk holds all channels; where
// the registers cannot, `dots` brings gc . x[:, s] from pixel_dot. The weight gradient is summed over a block's pixels
// in registers, over an image's splits by the image's last block, over images by the last image's.
//
// Moves: x once, grad_x once (N*C*S elements each), logits once (N*S accumulation type).
#pragma once

#include "softmax.h"
#include "split_merge.h"
#include "tile.h"

namespace gc {

// Taller tiles serve only launches whose blocks hold all channels: they never take `dots`, and spare its registers.
inline constexpr int kDotsRows = 8;

template <typename T, Layout kLayout, int kRows, int kWidth, bool kMask>
GC_KERNEL(kMaxThreads, 1)
pool_backward(const PoolBackwardArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;

  const typename TileT::Map map(args.walk);
  const A* const state = static_cast<const A*>(args.state) + map.state0();
  const A m = state[0];
  const A inverse_z = A(1) / state[1];

  port::SharedArena arena;
  A* grad_context = arena.take<A>(map.tile_channels());
  A* mask_weight = arena.take<A>(kMask ? map.tile_channels() : 0);
  A* const context_dot_scratch = arena.take<A>(over_channels_scratch(kLayout, map.shape, 1));
  const int dot_count = over_channels_scratch(kLayout, map.shape, kPixels);
  A* const dot_scratch = arena.take<A>(args.dots == nullptr ? 2 * dot_count : 0);
  stage_channels(map, grad_context, [&](int channel) { return read<T>(args.grad_context, map.channels0() + channel); });
  if constexpr (kMask)
    stage_channels(map, mask_weight, [&](int channel) { return read<T>(args.mask_weight, channel); });
  grad_context += map.channel_thread() * kChannels;
  mask_weight += kMask ? map.channel_thread() * kChannels : 0;

  A context_dot[1] = {0};  // over all channels of the image, whatever the block's chunk
  for (int c = map.channel_thread(); c < map.channels; c += channel_threads(kLayout, map.shape)) {
    context_dot[0] += read<T>(args.grad_context, map.channels0() + c) * state[2 + c];
  }
  OverChannels<kLayout, 1>::publish(map, context_dot, context_dot_scratch);
  port::sync_block<kSyncGradStaged>();
  OverChannels<kLayout, 1>::collect(map, context_dot, context_dot_scratch);

  A weight_sums[kChannels];
  GC_UNROLL
  for (int c = 0; c < kChannels; ++c) weight_sums[c] = 0;

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT tile;
    tile.load(static_cast<const T*>(args.x) + map.image0(), map, pixel0);

    A grad_logit[kPixels];  // gc . x first
    if (kRows > kDotsRows || args.dots == nullptr) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) grad_logit[p] = 0;
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const A g = grad_context[c];
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) grad_logit[p] += g * tile(c, p);
      }
      // Two scratch areas in turn: who writes one again has passed the barrier after which nobody reads it.
      A* const scratch = dot_scratch + (tile_index & 1) * dot_count;
      OverChannels<kLayout, kPixels>::publish(map, grad_logit, scratch);
      tile.keep_packed();
      port::sync_block<kSyncGradDot>();
      OverChannels<kLayout, kPixels>::collect(map, grad_logit, scratch);
    } else {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int pixel = map.pixel(pixel0, p);
        grad_logit[p] = pixel < map.pixels ? static_cast<const A*>(args.dots)[map.pixels0() + pixel] : A(0);
      }
    }

    A attention[kPixels];
    GC_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const int pixel = map.pixel(pixel0, p);
      const bool inside = pixel < map.pixels;
      attention[p] = inside ? exp_below(read<T>(args.logits, map.pixels0() + pixel), m) * inverse_z : A(0);
      grad_logit[p] = inside ? attention[p] * (grad_logit[p] - context_dot[0]) : A(0);
      if constexpr (!kMask) {
        if (inside && map.channel_thread() == 0 && port::block_y() == 0) {
          write<T>(args.grad_logits, map.pixels0() + pixel, grad_logit[p]);
        }
      }
    }
    // Row by row, each stored when it is done: its registers are free for the next.
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GC_UNROLL
      for (int e = 0; e < TileT::kRowElements; ++e) {
        const int c = TileT::Map::kChannelsFast ? e : r;
        const int p = TileT::Map::kChannelsFast ? r : e;
        A grad = attention[p] * grad_context[c];
        if constexpr (kMask) {
          weight_sums[c] += grad_logit[p] * tile(c, p);
          grad += grad_logit[p] * mask_weight[c];
        }
        tile.set(c, p, grad);  // x is done with: its registers take the gradient
      }
      tile.store_row(static_cast<T*>(args.grad_x) + map.image0(), map, pixel0, r);
    }
  }

  if constexpr (kMask) {
    A* const sum_scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, kChannels));
    OverPixels<kLayout, kChannels>::publish(map, weight_sums, sum_scratch);
    port::sync_block<kSyncWeightSum>();
    OverPixels<kLayout, kChannels>::collect(map, weight_sums, sum_scratch);
    if (map.pixel_thread() == 0) {
      A* const out = static_cast<A*>(args.partial_weight) + static_cast<long long>(port::block_x()) * map.channels;
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (map.channel(c) < map.channels) out[map.channel(c)] = weight_sums[c];
      }
    }
    int* const last_split = arena.take<int>(1);
    int* const last_image = arena.take<int>(1);
    unsigned* const image_ticket = args.tickets + map.image_chunk();
    if (!arrive_last(image_ticket, args.walk.splits, last_split)) return;
    A* const image_weight = static_cast<A*>(args.image_weight);
    const auto plainly = [](int) { return A(1); };
    const A* const parts = static_cast<const A*>(args.partial_weight) + map.channels0() * args.walk.splits;
    add_rows(map, parts, args.walk.splits, plainly, [&](int c, A sum) { image_weight[map.channels0() + c] = sum; });
    unsigned* const batch_ticket =
        args.tickets + (static_cast<long long>(args.walk.images) * port::grid_y() + port::block_y());
    if (!arrive_last(batch_ticket, args.walk.images, last_image)) return;
    add_rows(map, image_weight, args.walk.images, plainly, [&](int c, A sum) { write<T>(args.grad_weight, c, sum); });
  }
}

}  // namespace gc
