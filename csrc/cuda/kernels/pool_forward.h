// Pooling of a feature map over its pixels, in one launch and one read of x:
//
//   context[n, c] = sum_s a[n, s] * x[n, c, s],   a = softmax over s of logits[n, s]
//
//   kMask     logits[n, s] = mask_weight . x[n, :, s] + mask_bias, computed from the same registers and written
//   kLogits   logits are given
//   kUniform  a = factor for every pixel: the mean or the sum (no softmax)
//
// x [N, C, S] (NCHW) or [N, S, C] (NHWC) -> context [N, C], state [N, C + 2] = (m, z, context unrounded); with kUniform
// (0, S, context unrounded). Either may be left out.
//
// Decomposition: block (image * splits + split, chunk) walks the tiles of its split for its chunk of channels (with
// kMask the one chunk holds all channels). Every thread keeps kRows vectors of x and a running (m, z, sums over its
// pixels); threads of the same pixels agree bit for bit, for they read the same dot products. At the end the block
// combines its pixel threads and writes (m, z, sums) as the partial result of its split. The last blocks of an image
// and chunk merge the partial results in order (split_merge.h), unless the transform that follows does (late_merge.h).
//
// With Path::kTilesAhead (and a mask), a tile comes through shared memory: the next one is on the way while the block
// works on this one, the first while the mask weights are fetched. Otherwise it waits for each.
//
// With a norm (normalized_pool.h), what is pooled is y - mean, and the logits are those of x.
//
// Moves: x once (N*C*S elements), logits once (N*S accumulation type, read or written), N*splits*(C + 2) values of
// partial results.
#pragma once

#include "args.h"
#include "traits.h"

namespace gc {

// Takes what pool_forward takes of shared memory.
template <typename Traits, typename A>
GC_BOTH void take_pool_shared(CountingArena& arena, const BlockTile& tile, const Walk& walk) {
  const int staged = staged_elements(tile.thread_channels, Traits::kNormalized ? 2 : 1, sizeof(A));
  if (Traits::kMask) arena.take<A>(staged * channel_threads(tile.layout, tile.shape));  // the mask weights
  if (Traits::kMask) arena.take<A>(2 * tile.over_channels(tile.thread_pixels));         // dots
  if (Traits::kTilesAhead) arena.take<VectorPlace>(tile.rows() * tile.threads());       // places
  if (Traits::kSoftmax) arena.take<A>(tile.over_pixels(1));                             // max_scratch
  arena.take<A>(tile.over_pixels(tile.thread_channels + 1));                            // sum_scratch
  if (walk.splits == 1 || walk.merged_later) return;
  arena.take<int>(1);  // flag
  if (Traits::kSoftmax) arena.take<A>(3 * merged_at_most(walk.splits, walk.group));
}

// The kinds. Their partial results are the sums over pixels, and for a softmax m and z. kNewer: the newer paths.
template <Weighting kWeighting_, Path... kNewer>
struct PoolForwardTraits : KernelTraits {
  using Args = PoolForwardArgs;
  static constexpr Paths kPaths = Paths(kNewer...);
  static constexpr Weighting kWeighting = kWeighting_;
  static constexpr bool kMask = kWeighting == Weighting::kMask;
  static constexpr bool kSoftmax = kWeighting != Weighting::kUniform;

  static constexpr KernelKind kKind = kMask      ? KernelKind::kPoolMask
                                      : kSoftmax ? KernelKind::kPoolLogits
                                                 : KernelKind::kPoolUniform;
  static constexpr const char* kName = kMask ? "pool_mask" : kSoftmax ? "pool_logits" : "pool_uniform";
  static constexpr bool kTilesAhead = kPaths.has(Path::kTilesAhead);
  static_assert(kMask || !kTilesAhead, "other tiles are not waited for at a barrier");
  static constexpr int kLeastAccess = kTilesAhead ? kLeastStaged : 1;
  static constexpr int kTallRows = kMask ? 16 : 0;
  static constexpr bool kWholeChannels = kMask;
  static constexpr Paths kPlannedPaths = Path::kLateMerge;
  static constexpr Merge kMerge = Merge::kImage;
  static constexpr int kPartialVectors = 1;
  static constexpr int kPartialValues = kSoftmax ? 2 : 0;

  static constexpr bool kNeighbours = kPaths.has(Path::kNeighbours);
  static_assert(!kNeighbours || !kSoftmax, "measured for uniform pooling only");

  // With Path::kFullMachine. Blocks are half as long, so twice as many partial results are merged in one round.
  static constexpr bool kFullMachine = kPaths.has(Path::kFullMachine);
  static_assert(!kFullMachine || !kSoftmax, "a thread's registers for a softmax are more");
  static constexpr int kMostThreads = kFullMachine ? 256 : kMaxThreads;
  static constexpr int kMergedAtOnce = kFullMachine ? 16 : 8;
  static GC_BOTH int registers(int element_bytes) {
    return kFullMachine && element_bytes < 8 ? kFullMachineRegisters : kRegistersOfThread;
  }

  // As measured on an H100: two blocks of 256 threads on a multiprocessor hide each other's arithmetic, which for
  // halves is worth more than long rows.
  static constexpr TileChoice kChoices[] = {{8, 256, kLongRow},  {16, 256, kLongRow}, {8, 512, kLongRow},
                                            {8, 256, kFairRow},  {16, 256, kFairRow}, {8, 512, kFairRow},
                                            {16, 512, kFairRow}, {16, 512, 0},        {8, 512, 0}};
  static constexpr TileChoice kChoicesOfHalves[] = {{8, 256, kFairRow}, {8, 512, kFairRow}, {8, 512, 0}};
  static GC_BOTH TileChoices choices(int element_bytes) {
    return element_bytes == 2 ? TileChoices(kChoicesOfHalves) : TileChoices(kChoices);
  }

  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk& walk, bool /*dots_given*/) {
    take_pool_shared<PoolForwardTraits, A>(arena, tile, walk);
  }
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "softmax.h"
#include "split_merge.h"
#include "tile.h"

namespace gc {

template <Weighting kWeighting, typename T, typename Map>
GC_DEVICE void write_context(const PoolForwardArgs& args, const Map& map, int channel, Acc<T> sum, Acc<T> z) {
  const Acc<T> context = kWeighting == Weighting::kUniform ? sum * static_cast<Acc<T>>(args.factor) : sum / z;
  if (args.context.data != nullptr) write<T>(args.context, map.channels0() + channel, context);
  if (args.state != nullptr) static_cast<Acc<T>*>(args.state)[map.state0() + kStatistics + channel] = context;
}

template <Weighting kWeighting, typename T, typename Map>
GC_DEVICE void write_stats(const PoolForwardArgs& args, const Map& map, Acc<T> m, Acc<T> z) {
  if (args.state == nullptr || port::block_y() != 0 || port::thread_index() != 0) return;
  Acc<T>* const state = static_cast<Acc<T>*>(args.state) + map.state0();
  state[0] = kWeighting == Weighting::kUniform ? Acc<T>(0) : m;
  state[1] = kWeighting == Weighting::kUniform ? static_cast<Acc<T>>(map.pixels) : z;
}

// Merges the partial results first .. first + count of the block's image and chunk into number `to` or the result: each
// thread some channels, each channel in the order of the partial results. shared: 3 values for each of them.
template <typename Traits, typename T, typename Map>
GC_DEVICE void merge_splits(const typename Traits::Args& args, const Map& map, int first, int count, int to,
                            Acc<T>* shared) {
  using A = Acc<T>;
  constexpr Weighting kWeighting = Traits::kWeighting;
  const int rows = merged_rows(args.walk.splits, args.walk.group);
  A* const sums = static_cast<A*>(args.partial_context) + map.channels0() * rows;
  A* const stats = static_cast<A*>(args.partial_stats) + map.image_chunk() * rows * 2;
  A* const weight = shared + 2 * count;
  A m = minus_infinity<A>();
  A z = 0;
  if constexpr (kWeighting != Weighting::kUniform) {
    for (int i = port::thread_index(); i < 2 * count; i += port::block_threads()) shared[i] = stats[2 * first + i];
    port::sync_block<kSyncSplitStats>();
    for (int k = 0; k < count; ++k) m = Max::combine(m, shared[2 * k]);
    for (int k = port::thread_index(); k < count; k += port::block_threads()) weight[k] = exp_below(shared[2 * k], m);
    port::sync_block<kSyncSplitWeights>();
    for (int k = 0; k < count; ++k) z += weight[k] * shared[2 * k + 1];
  }
  if constexpr (Traits::kFullMachine) {
    sum_partials<8>(map, sums + static_cast<long long>(first) * map.channels, count, [&](int channel, A sum) {
      if (to == kMergedResult) return write_context<kWeighting, T>(args, map, channel, sum, z);
      sums[static_cast<long long>(to) * map.channels + channel] = sum;
    });
  } else {
    add_partials(
        map, sums + static_cast<long long>(first) * map.channels, count,
        [&](int k) { return kWeighting == Weighting::kUniform ? A(1) : weight[k]; },
        [&](int channel, A sum) {
          if (to == kMergedResult) {
            write_context<kWeighting, T>(args, map, channel, sum, z);
          } else {
            sums[static_cast<long long>(to) * map.channels + channel] = sum;
          }
        });
  }
  if (to == kMergedResult) {
    write_stats<kWeighting, T>(args, map, m, z);
  } else if (kWeighting != Weighting::kUniform && port::thread_index() == 0) {
    stats[2 * to] = m;
    stats[2 * to + 1] = z;
  }
}

template <typename T, Layout kLayout, int kRows, int kWidth, typename Traits>
GC_KERNEL(Traits::kMostThreads, (resident_blocks(Traits::kMostThreads, Traits::registers(sizeof(T)))))
pool_forward(const typename Traits::Args args) {
  using A = Acc<T>;
  using TileT = TileOf<Traits, T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;
  constexpr Weighting kWeighting = Traits::kWeighting;
  static_assert(has_tile<Traits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  static_assert(has_width<Traits>(kWidth, kElements<T>), "no plan has such loads");

  port::let_next_launch_begin();
  const typename TileT::Map map(args.walk);
  const T* const x = static_cast<const T*>(args.x) + map.image0();

  port::SharedArena arena;
  A* weight = nullptr;
  ScratchInTurn<A> dots{nullptr, over_channels_scratch(kLayout, map.shape, kPixels)};
  typename TileT::Place* places = nullptr;
  A bias = 0;
  // With a norm the mean lies beside the mask's weight, or in registers; shift is the thread's part of mask_weight . bias.
  constexpr int kStaged = Traits::kNormalized ? 2 : 1;
  constexpr int kOwnStaged = staged_elements(kChannels, kStaged, sizeof(A));
  [[maybe_unused]] A mean[kChannels];
  A shift = 0;
  if constexpr (Traits::kNormalized) {
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const int channel = map.channel(c);
      const bool inside = channel < map.channels;
      if constexpr (Traits::kMask) {
        if (inside) shift += read<T>(args.mask_weight, channel) * bias_at<T>(args.norm, channel);
      } else {
        mean[c] = inside ? mean_at<T>(args.norm, channel) : A(0);
      }
    }
  }
  if constexpr (Traits::kMask) {
    weight = arena.take<A>(kOwnStaged * channel_threads(kLayout, map.shape));
    dots.areas = arena.take<A>(2 * dots.count);
    if constexpr (Traits::kTilesAhead) {
      places = arena.take<typename TileT::Place>(TileT::places());
      TileT::stage(places, x, map, map.first_tile * map.tile_pixels());
    }
    if constexpr (Traits::kNormalized) {
      stage_channels<kStaged>(map, weight, [&](int channel) {
        return read<T>(args.mask_weight, channel) * slope_at<T>(args.norm, channel);
      });
      stage_channels<kStaged>(map, weight + 1, [&](int channel) { return mean_at<T>(args.norm, channel); });
    } else {
      stage_channels(map, weight, [&](int channel) { return read<T>(args.mask_weight, channel); });
    }
    if (args.mask_bias.data != nullptr) bias = read<T>(args.mask_bias, 0);
    if (Traits::kNormalized && map.channel_thread() == 0) shift += bias;
    port::sync_block<kSyncStaged>();
    weight += map.channel_thread() * kOwnStaged;
  }

  A m = minus_infinity<A>();
  A sums[kChannels + 1];  // over this thread's pixels: each channel's weighted sum, then z
  GC_UNROLL
  for (int i = 0; i <= kChannels; ++i) sums[i] = 0;

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT tile;
    if constexpr (Traits::kTilesAhead) {
      port::await_staged<kAwaitTile>();
      tile.take(places);
      if (tile_index + 1 < map.end_tile) TileT::stage(places, x, map, pixel0 + map.tile_pixels());
    } else {
      tile.load(x, map, pixel0);
    }
    // The tile's registers take y - mean, unless it would have to be rounded for them.
    constexpr bool kCentred = sizeof(T) == sizeof(A);
    [[maybe_unused]] const auto mean_of = [&](int c) {
      if constexpr (Traits::kMask) return weight[c * kStaged + 1];
      return mean[c];
    };
    if constexpr (Traits::kNormalized && kCentred) {
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const A own_mean = mean_of(c);
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) tile.set(c, p, tile(c, p) - own_mean);
      }
    }
    const auto value = [&](int c, int p) {
      if constexpr (Traits::kNormalized && !kCentred) return tile(c, p) - mean_of(c);
      return tile(c, p);
    };

    A a[kPixels];  // logits, then attention relative to m
    if constexpr (Traits::kMask) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) a[p] = Traits::kNormalized ? shift : A(0);
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) a[p] += weight[c * kStaged] * value(c, p);
      }
      A* const scratch = dots.of_tile(tile_index);
      OverChannels<kLayout, kPixels>::publish(map, a, scratch);
      tile.keep_packed();
      port::sync_block<kSyncDot>();
      OverChannels<kLayout, kPixels>::collect(map, a, scratch);
      if constexpr (!Traits::kNormalized) {
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) a[p] += bias;
      }
      if (map.channel_thread() == 0) {
        GC_UNROLL
        for (int p = 0; p < kPixels; ++p) {
          const int pixel = map.pixel(pixel0, p);
          if (pixel < map.pixels) static_cast<A*>(args.logits)[map.pixels0() + pixel] = a[p];
        }
      }
    } else if constexpr (Traits::kSoftmax) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int pixel = map.pixel(pixel0, p);
        a[p] = pixel < map.pixels ? read<T>(args.given_logits, map.pixels0() + pixel) : A(0);
      }
    }

    if constexpr (!Traits::kSoftmax) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        a[p] = 1;
        // Outside of the image y is 0, but y - mean is not.
        if constexpr (Traits::kNormalized) a[p] = map.pixel(pixel0, p) < map.pixels ? A(1) : A(0);
      }
    } else {
      A m_new = m;
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        if (map.pixel(pixel0, p) < map.pixels) m_new = Max::combine(m_new, a[p]);
      }
      const A rescale = exp_below(m, m_new);
      GC_UNROLL
      for (int i = 0; i <= kChannels; ++i) sums[i] *= rescale;
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        a[p] = map.pixel(pixel0, p) < map.pixels ? exp_below(a[p], m_new) : A(0);
        sums[kChannels] += a[p];
      }
      m = m_new;
    }
    // No pixel is skipped for a weight of 0: 0 * inf must stay NaN.
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      A tile_sum = 0;
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) tile_sum += a[p] * value(c, p);
      sums[c] += tile_sum;
    }
  }

  A block_max[1] = {m};
  if constexpr (Traits::kSoftmax) {
    A* const max_scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, 1));
    OverPixels<kLayout, 1, Max>::publish(map, block_max, max_scratch);
    port::sync_block<kSyncPixelMax>();
    OverPixels<kLayout, 1, Max>::collect(map, block_max, max_scratch);
    const A rescale = exp_below(m, block_max[0]);
    GC_UNROLL
    for (int i = 0; i <= kChannels; ++i) sums[i] *= rescale;
  }
  A* const sum_scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, kChannels + 1));
  OverPixels<kLayout, kChannels + 1>::publish(map, sums, sum_scratch);
  port::sync_block<kSyncPixelSum>();
  OverPixels<kLayout, kChannels + 1>::collect(map, sums, sum_scratch);

  const A z = sums[kChannels];
  if (args.walk.splits == 1) {
    if (map.pixel_thread() == 0) {
      GC_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (map.channel(c) < map.channels) write_context<kWeighting, T>(args, map, map.channel(c), sums[c], z);
      }
    }
    write_stats<kWeighting, T>(args, map, block_max[0], z);
    return;
  }
  const int rows = merged_rows(args.walk.splits, args.walk.group);
  if (map.pixel_thread() == 0) {
    A* const out =
        static_cast<A*>(args.partial_context) + (static_cast<long long>(map.image) * rows + map.split) * map.channels;
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (map.channel(c) < map.channels) out[map.channel(c)] = sums[c];
    }
    if (Traits::kSoftmax && map.channel_thread() == 0) {
      A* const stats = static_cast<A*>(args.partial_stats) + (map.image_chunk() * rows + map.split) * 2;
      stats[0] = block_max[0];
      stats[1] = z;
    }
  }
  if (args.walk.merged_later) return;
  int* const flag = arena.take<int>(1);
  const int most = merged_at_most(args.walk.splits, args.walk.group);
  A* const merged = arena.take<A>(Traits::kSoftmax ? 3 * most : 0);
  unsigned* const tickets = args.tickets + map.image_chunk() * merge_tickets(args.walk.splits, args.walk.group);
  merge_partials(map.split, args.walk.splits, args.walk.group, tickets, flag,
                 [&](int first, int count, int to) { merge_splits<Traits, T>(args, map, first, count, to, merged); });
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
