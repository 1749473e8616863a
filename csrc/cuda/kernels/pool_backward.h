// Backward of softmax pooling, in one launch and one read of x. With gc = grad_context[n] and a = softmax(logits[n]):
//
//   grad_logits[s]   = a[s] * (gc . (x[:, s] - context))
//   grad_x[:, s]     = a[s] * gc + grad_logits[s] * mask_weight         (the second term with a mask)
//   grad_mask_weight = sum of grad_logits[s] * (x[:, s] - context)      (with a mask; over n and s)
//
// With kBlock, the same for a whole context block, whose out = x * scale + ...: grad_x gains grad * scale. With
// kLogits, grad_logits is written instead of being folded into grad_x.
//
// The softmax's inner product sum_s a[s] * (gc . x[:, s]) equals gc . context, which the forward pass has kept: so the
// pixels do not depend on each other.
//
// x is taken relative to the context wherever it meets a gradient of the logits. gc . x - gc . context would leave the
// rounding errors of two large numbers where they cancel, which is everywhere where one pixel has all the weight: there
// x - context is exactly 0. And an image's gradients of the logits add up to 0, so the context changes nothing in the
// sum that is the weight gradient, but without it that sum has their rounding errors times the mean of x.
//
// Decomposition: as pool_forward; block (image * splits + split, chunk). Usually one chunk holds all channels; where
// the registers cannot, `dots` brings gc . (x[:, s] - context) from pixel_dot. The weight gradient is summed over a
// block's pixels in registers, over the blocks of all images by the last of them (split_merge.h).
//
// With Path::kStagedGrad, grad comes through shared memory: its tile is on the way while the dot products are computed,
// and needs no registers until then. Otherwise it comes after them, as many rows at a time as there are registers for.
//
// Moves: x once, grad_x once, with kBlock grad once (N*C*S elements each), logits once (N*S accumulation type).
//
// With kNormalized, the same for a residual tail's block, whose x = slope (y - mean) + bias is not there: with
// z = y - mean and the context that of z,
//
//   grad_logits[s] = a[s] * (slope * gc . (z[:, s] - context))
//   grad_folded    = sum of grad_logits[s] * (z[:, s] - context)        (that of slope * mask_weight; over n and s)
//
// It reads y once and writes a and grad_logits for grad_y, which makes the gradient of y of them. The mean and the
// context are subtracted one after the other: their sum would be rounded where the mean is large.
#pragma once

#include "tail_backward_args.h"
#include "traits.h"

namespace gc {

// The kinds. A partial result is the sums that are the weight gradient.
template <PoolGradient kGradient_, Path... kNewer>
struct PoolBackwardTraits : KernelTraits {
  static constexpr Paths kPaths = Paths(kNewer...);
  static constexpr PoolGradient kGradient = kGradient_;
  static constexpr bool kNormalized = false;
  using Args = PoolBackwardArgs;
  static constexpr bool kStagedGrad = kPaths.has(Path::kStagedGrad);
  static constexpr bool kMask = kGradient != PoolGradient::kLogits;
  static constexpr bool kBlock = kGradient == PoolGradient::kBlock;

  static constexpr KernelKind kKind = kBlock  ? KernelKind::kPoolBackwardBlock
                                      : kMask ? KernelKind::kPoolBackwardMask
                                              : KernelKind::kPoolBackwardLogits;
  static constexpr const char* kName = kBlock  ? "pool_backward_block"
                                       : kMask ? "pool_backward_mask"
                                               : "pool_backward_logits";
  static_assert(kBlock || !kStagedGrad, "only a block's gradient has grad");
  static constexpr int kLeastAccess = kStagedGrad ? kLeastStaged : 1;
  static constexpr int kTallRows = kStagedGrad ? 0 : 16;
  static constexpr bool kWholeChannels = true;
  static constexpr bool kBackwards = true;
  static constexpr Paths kPlannedPaths = kBlock ? Paths(Path::kEarlyStart) : Paths();
  static constexpr Merge kMerge = kMask ? Merge::kAll : Merge::kNone;
  static constexpr int kPartialVectors = kMask ? 1 : 0;

  // As measured on an H100. A tile of 16 rows leaves no registers to fetch more than one row of the gradient at a time.
  static constexpr TileChoice kChoices[] = {{8, 256, kLongRow},  {8, 512, kLongRow}, {16, 512, kLongRow},
                                            {16, 512, kFairRow}, {16, 512, 0},       {8, 512, 0}};
  // Staged, grad waits for no registers, and beside a tall tile there are too few for its addresses.
  static constexpr TileChoice kChoicesOfStaged[] = {{8, 256, kLongRow}, {8, 512, 0}};
  static GC_BOTH TileChoices choices(int /*element_bytes*/) {
    return kStagedGrad ? TileChoices(kChoicesOfStaged) : TileChoices(kChoices);
  }

  // Of each channel, side by side: grad_context, the context, the mask weight, the scale.
  static constexpr int kStaged = kBlock ? 4 : kMask ? 3 : 2;
  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk&, bool dots_given) {
    const int threads = channel_threads(tile.layout, tile.shape);
    arena.take<A>(staged_elements(tile.thread_channels, kStaged, sizeof(A)) * threads);  // staged
    if (!dots_given) arena.take<A>(2 * tile.over_channels(tile.thread_pixels));          // dots
    if (kStagedGrad) arena.take<VectorPlace>(tile.rows() * tile.threads());              // grad_places
    if (kMask) arena.take<A>(tile.over_pixels(tile.thread_channels));                    // sum_scratch
    if (kMask) arena.take<int>(1);                                                       // flag
  }
};

// Staged of each channel: slope * grad_context, the context, the mean.
struct NormalizedPoolBackwardTraits : PoolBackwardTraits<PoolGradient::kMask> {
  static constexpr bool kNormalized = true;
  using Args = NormalizedPoolBackwardArgs;
  static constexpr KernelKind kKind = KernelKind::kPoolBackwardNormalized;
  static constexpr const char* kName = "pool_backward_normalized";
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "softmax.h"
#include "split_merge.h"
#include "tile.h"

namespace gc {

// Vectors of grad that a thread fetches together, as far as there are registers beside the tile's.
template <typename T, int kRows>
inline constexpr int kGradRows = kRows > 8        ? 1
                                 : sizeof(T) == 2 ? 4
                                                  : kRows;

template <typename T, Layout kLayout, int kRows, int kWidth, typename Traits>
GC_KERNEL(kMaxThreads, 1)
pool_backward(const typename Traits::Args args) {
  using A = Acc<T>;
  using TileT = TileOf<Traits, T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;
  constexpr bool kMask = Traits::kMask;
  constexpr bool kBlock = Traits::kBlock;
  constexpr bool kNormalized = Traits::kNormalized;
  constexpr int kStaged = Traits::kStaged;
  static_assert(has_tile<Traits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");

  const typename TileT::Map map(args.walk);
  if constexpr (kBlock) port::wait_for_launch_before<kWaitPoolBackward>();
  const A* const state = static_cast<const A*>(args.state) + map.state0();
  const A m = state[0];
  const A inverse_z = A(1) / state[1];

  port::SharedArena arena;
  A* staged = arena.take<A>(staged_elements(kChannels, kStaged, sizeof(A)) * channel_threads(kLayout, map.shape));
  const int dot_count = over_channels_scratch(kLayout, map.shape, kPixels);
  const ScratchInTurn<A> dots{arena.take<A>(args.dots == nullptr ? 2 * dot_count : 0), dot_count};
  typename TileT::Place* grad_places = nullptr;
  if constexpr (Traits::kStagedGrad) grad_places = arena.take<typename TileT::Place>(TileT::places());
  stage_channels<kStaged>(map, staged, [&](int c) {
    if constexpr (kNormalized) return slope_at<T>(args.norm, c) * read<T>(args.grad_context, map.channels0() + c);
    return read<T>(args.grad_context, map.channels0() + c);
  });
  stage_channels<kStaged>(map, staged + 1, [&](int c) { return state[kStatistics + c]; });
  if constexpr (kNormalized) {
    stage_channels<kStaged>(map, staged + 2, [&](int c) { return mean_at<T>(args.norm, c); });
  } else if constexpr (kMask) {
    stage_channels<kStaged>(map, staged + 2, [&](int c) { return read<T>(args.mask_weight, c); });
  }
  if constexpr (kBlock) {
    const bool scaled = args.scale.data != nullptr;
    stage_channels<kStaged>(map, staged + 3,
                            [&](int c) { return scaled ? read<T>(args.scale, map.channels0() + c) : A(1); });
  }
  port::sync_block<kSyncGradStaged>();
  staged += map.channel_thread() * staged_elements(kChannels, kStaged, sizeof(A));
  // The tile's registers take x - context, unless it would have to be rounded for them.
  constexpr bool kCentred = sizeof(T) == sizeof(A);

  A weight_sums[kChannels];
  GC_UNROLL
  for (int c = 0; c < kChannels; ++c) weight_sums[c] = 0;

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    if constexpr (Traits::kStagedGrad) {
      if (args.grad_x != nullptr) {
        TileT::stage(grad_places, static_cast<const T*>(args.grad) + map.image0(), map, pixel0);
      }
    }
    TileT tile;
    tile.load(static_cast<const T*>(args.x) + map.image0(), map, pixel0);

    const auto without_mean = [&](int c, int p) {
      return kNormalized ? tile(c, p) - staged[c * kStaged + 2] : tile(c, p);
    };
    if constexpr (kCentred) {
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const A context = staged[c * kStaged + 1];
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) tile.set(c, p, without_mean(c, p) - context);
      }
    }
    const auto centred = [&](int c, int p) {
      return kCentred ? tile(c, p) : without_mean(c, p) - staged[c * kStaged + 1];
    };

    A grad_logit[kPixels];  // gc . (x - context) first
    // Only blocks with all channels have tall tiles: they never take `dots`, and spare its registers.
    if (kRows == Traits::kTallRows || args.dots == nullptr) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) grad_logit[p] = 0;
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const A g = staged[c * kStaged];
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) grad_logit[p] += g * centred(c, p);
      }
      A* const scratch = dots.of_tile(tile_index);
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
      grad_logit[p] = inside ? attention[p] * grad_logit[p] : A(0);
      if constexpr (!kMask || kNormalized) {
        if (inside && map.channel_thread() == 0 && port::block_y() == 0) {
          write<T>(args.grad_logits, map.pixels0() + pixel, grad_logit[p]);
          if constexpr (kNormalized) static_cast<A*>(args.attention)[map.pixels0() + pixel] = attention[p];
        }
      }
    }
    if constexpr (Traits::kStagedGrad) port::await_staged<kAwaitGrad>();
    // Row by row, each stored when it is done: its registers are free for the next.
    constexpr int kStep = Traits::kStagedGrad ? 1 : kGradRows<T, kRows>;
    GC_UNROLL
    for (int r0 = 0; r0 < kRows; r0 += kStep) {
      PackedVector<T> grad_rows[kStep] = {};
      if constexpr (kBlock) {
        if (args.grad_x != nullptr) {
          if constexpr (Traits::kStagedGrad) {
            TileT::take_row(grad_rows[0], grad_places, r0);
          } else {
            const T* const grad = static_cast<const T*>(args.grad) + map.image0();
            GC_UNROLL
            for (int i = 0; i < kStep; ++i) TileT::load_row(grad_rows[i], grad, map, pixel0, r0 + i);
          }
        }
      }
      GC_UNROLL
      for (int r = r0; r < r0 + kStep; ++r) {
        GC_UNROLL
        for (int e = 0; e < TileT::kRowElements; ++e) {
          const int c = TileT::Map::kChannelsFast ? e : r;
          const int p = TileT::Map::kChannelsFast ? r : e;
          if constexpr (kNormalized) {
            weight_sums[c] += grad_logit[p] * centred(c, p);
            continue;
          }
          A grad = attention[p] * staged[c * kStaged];
          if constexpr (kMask) {
            weight_sums[c] += grad_logit[p] * centred(c, p);
            grad += grad_logit[p] * staged[c * kStaged + 2];
          }
          if constexpr (kBlock) grad += staged[c * kStaged + 3] * grad_rows[r - r0].get(e);
          tile.set(c, p, grad);  // x is done with: its registers take the gradient
        }
        if (!kNormalized && (!kBlock || args.grad_x != nullptr))
          tile.store_row(static_cast<T*>(args.grad_x) + map.image0(), map, pixel0, r);
      }
    }
  }

  if constexpr (kMask) {
    A* const sum_scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, kChannels));
    int* const flag = arena.take<int>(1);
    if (args.grad_weight.data == nullptr) return;
    OverPixels<kLayout, kChannels>::publish(map, weight_sums, sum_scratch);
    port::sync_block<kSyncWeightSum>();
    OverPixels<kLayout, kChannels>::collect(map, weight_sums, sum_scratch);
    // One partial result for each block of the chunk, of all images.
    A* const partials = static_cast<A*>(args.partial_weight);
    const int own = map.block_of(args.walk);
    if (map.pixel_thread() == 0) {
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (map.channel(c) < map.channels)
          partials[static_cast<long long>(own) * map.channels + map.channel(c)] = weight_sums[c];
      }
    }
    const int count = args.walk.images * args.walk.splits;
    merge_partials(own, count, args.walk.group, args.tickets + port::block_y() * merge_tickets(count, args.walk.group),
                   flag, [&](int first, int how_many, int to) {
                     add_partials(
                         map, partials + static_cast<long long>(first) * map.channels, how_many,
                         [](int) { return A(1); },
                         [&](int c, A sum) {
                           if (to == kMergedResult) {
                             write<T>(args.grad_weight, c, sum);
                           } else {
                             partials[static_cast<long long>(to) * map.channels + c] = sum;
                           }
                         });
                   });
  }
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
