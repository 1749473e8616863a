// The first step of the residual tail's backward pass, in one launch: the ReLU's gradient, and its sums over the pixels,
//
//   g                  = 0 where out <= 0, else grad          (as PyTorch's: where out is NaN, grad passes)
//   sums[n, c]         = sum_s g
//   product_sums[n, c] = sum_s g * (y - mean[c])
//
// g is the gradient of identity, too. Without a ReLU (out is absent) it is grad and is not written; product_sums may be
// absent.
//
// grad, out, y, g [N, C, S] or [N, S, C]; mean [C]. The mean is subtracted from y as it is read: sums of g * y and of g
// would leave the rounding errors of two large numbers where the mean is larger than the deviation.
//
// Decomposition: block (image * splits + split, chunk) walks the tiles of its split for its chunk of channels. Sums are
// combined as in pool_forward: in registers, over the block's pixel threads, and over the splits in order by the last
// blocks of an image and chunk (split_merge.h).
//
// Moves: grad, out, y and g once each (N*C*S elements), as far as they are given: one instantiation serves all cases.
#pragma once

#include "tail_backward_args.h"
#include "traits.h"

namespace gc {

// A partial result is both sums over pixels.
struct ResidualSumsTraits : KernelTraits {
  static constexpr KernelKind kKind = KernelKind::kResidualSums;
  static constexpr const char* kName = "residual_sums";
  static constexpr int kRows = 4;  // of up to three maps
  static constexpr Merge kMerge = Merge::kImage;
  static constexpr int kPartialVectors = 2;

  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk& walk, bool) {
    arena.take<A>(tile.over_pixels(2 * tile.thread_channels));  // scratch
    if (walk.splits > 1) arena.take<int>(1);                    // flag
  }
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "split_merge.h"
#include "tile.h"

namespace gc {

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
residual_sums(const ResidualSumsArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kSums = 2 * kChannels;
  static_assert(has_tile<ResidualSumsTraits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  port::let_next_launch_begin();
  const typename TileT::Map map(args.walk);
  const bool masks = args.out != nullptr;
  const bool with_products = args.y != nullptr;

  A mean[kChannels];
  A sums[kSums];  // of g, then of the products
  GC_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    const bool subtracts = with_products && args.mean.data != nullptr && map.channel(c) < map.channels;
    mean[c] = subtracts ? read<T>(args.mean, map.channel(c)) : A(0);
  }
  GC_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT grad, out{}, y{};
    grad.load(static_cast<const T*>(args.grad) + map.image0(), map, pixel0);
    if (masks) out.load(static_cast<const T*>(args.out) + map.image0(), map, pixel0);
    if (with_products) y.load(static_cast<const T*>(args.y) + map.image0(), map, pixel0);
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      A grad_sum = 0;
      A product_sum = 0;
      GC_UNROLL
      for (int p = 0; p < TileT::kPixels; ++p) {
        A g = grad(c, p);
        g = masks && out(c, p) <= A(0) ? A(0) : g;
        grad.set(c, p, g);
        grad_sum += g;
        // Outside the image g is 0, and the mean of channels there.
        product_sum += g * (y(c, p) - mean[c]);
      }
      sums[c] += grad_sum;
      sums[kChannels + c] += product_sum;
    }
    if (masks) grad.store(static_cast<T*>(args.grad_in) + map.image0(), map, pixel0);
  }

  port::SharedArena arena;
  A* const scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, kSums));
  OverPixels<kLayout, kSums>::publish(map, sums, scratch);
  port::sync_block<kSyncResidualSum>();
  OverPixels<kLayout, kSums>::collect(map, sums, scratch);

  // Of both sums, a row for each partial result.
  const int rows = merged_rows(args.walk.splits, args.walk.group);
  A* const partials = static_cast<A*>(args.partial_sums) + map.channels0() * rows;
  const long long all_partials = static_cast<long long>(args.walk.images) * rows * map.channels;
  const auto put = [&](int to, bool of_products, int channel, A sum) {
    if (to != kMergedResult) {
      partials[(of_products ? all_partials : 0) + static_cast<long long>(to) * map.channels + channel] = sum;
    } else {
      static_cast<A*>(of_products ? args.product_sums : args.sums)[map.channels0() + channel] = sum;
    }
  };
  if (map.pixel_thread() == 0) {
    const int to = args.walk.splits == 1 ? kMergedResult : map.split;
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (map.channel(c) >= map.channels) continue;
      put(to, false, map.channel(c), sums[c]);
      if (with_products) put(to, true, map.channel(c), sums[kChannels + c]);
    }
  }
  if (args.walk.splits == 1) return;
  int* const flag = arena.take<int>(1);
  unsigned* const tickets = args.tickets + map.image_chunk() * merge_tickets(args.walk.splits, args.walk.group);
  const auto add = [&](int first, int count, int to, bool of_products) {
    const A* const from = partials + (of_products ? all_partials : 0) + static_cast<long long>(first) * map.channels;
    add_partials(
        map, from, count, [](int) { return A(1); }, [&](int channel, A sum) { put(to, of_products, channel, sum); });
  };
  merge_partials(map.split, args.walk.splits, args.walk.group, tickets, flag, [&](int first, int count, int to) {
    add(first, count, to, false);
    if (with_products) add(first, count, to, true);
  });
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
