// Giving a value per image and channel back to every pixel, and its backward, one launch each:
//
//   broadcast               out[n, c, s] = x[n, c, s] * scale[n, c] + term[n, c]        (either may be absent)
//   broadcast_mul_backward  grad_x = grad * scale,  grad_scale[n, c] = sum_s grad * x,  grad_term[n, c] = sum_s grad
//
// The backward may leave out grad_x (and then scale), which a whole block's last pass writes, and grad_term.
//
// x, out, grad, grad_x [N, C, S] or [N, S, C]; scale, term [N, C].
//
// Decomposition: block (image * splits + split, chunk) walks the tiles of its split for its chunk of channels. The sums
// of the backward are combined as in pool_forward: in registers, over the block's pixel threads, and over the splits in
// order by the last blocks of an image and chunk, unless the transform that follows does (late_merge.h).
//
// Moves: forward x and out once; backward grad, x and grad_x once (N*C*S elements each).
#pragma once

#include "args.h"
#include "traits.h"

namespace gc {

// With Path::kFullMachine the flat form only: at most two waves of blocks, as full as can be.
template <Path... kNewer>
struct BroadcastTraits : KernelTraits {
  static constexpr Paths kPaths = Paths(kNewer...);
  static constexpr bool kFullMachine = kPaths.has(Path::kFullMachine);
  static constexpr KernelKind kKind = KernelKind::kBroadcast;
  static constexpr const char* kName = "broadcast";
  static constexpr int kWaves = kFullMachine ? 2 : 4;
  static constexpr bool kBackwards = true;
  static constexpr int kFlatRows = 8;
  static constexpr Paths kPlannedPaths = Path::kEarlyStart;
  static constexpr bool kFlatOnly = kFullMachine;
  static constexpr int kMostThreads = kFullMachine ? 256 : kMaxThreads;
  static GC_BOTH int registers(int /*element_bytes*/) { return kFullMachine ? kMoreRegisters : kRegistersOfThread; }
};

// A partial result is the sums of both gradients over pixels.
struct BroadcastMulBackwardTraits : KernelTraits {
  static constexpr KernelKind kKind = KernelKind::kBroadcastMulBackward;
  static constexpr const char* kName = "broadcast_mul_backward";
  static constexpr int kRows = 4;  // of two maps
  static constexpr Paths kPlannedPaths = Path::kLateMerge;
  static constexpr Merge kMerge = Merge::kImage;
  static constexpr int kPartialVectors = 2;

  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk& walk, bool) {
    arena.take<A>(tile.over_pixels(2 * tile.thread_channels));  // scratch
    if (walk.splits == 1 || walk.merged_later) return;
    arena.take<int>(1);  // flag
  }
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "split_merge.h"
#include "tile.h"

namespace gc {

template <typename T, Layout kLayout, int kRows, int kWidth, bool kScale, bool kTerm>
GC_KERNEL(kMaxThreads, 1)
broadcast(const BroadcastArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  static_assert(has_tile<BroadcastTraits<>>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  const typename TileT::Map map(args.walk);
  port::wait_for_launch_before<kWaitBroadcast>();

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

// For NCHW where a row is not a multiple of a vector but the image is: takes the image as one contiguous range of full
// vectors, which may reach from one channel into the next. A tile is kRows vectors a thread.
template <typename T, int kRows, bool kScale, bool kTerm, typename Traits>
GC_KERNEL(Traits::kMostThreads, (resident_blocks(Traits::kMostThreads, Traits::registers(sizeof(T)))))
broadcast_flat(const BroadcastArgs args) {
  using A = Acc<T>;
  constexpr int kStep = kElements<T>;
  static_assert(kRows == Traits::kFlatRows, "no plan has such tiles");
  const Walk& walk = args.walk;
  const int block = walk.backwards ? port::grid_x() - 1 - port::block_x() : port::block_x();
  int image, first, end;  // the latter of tiles
  if constexpr (Traits::kFullMachine) {
    const PlannedBlock planned(walk, block);
    image = planned.image;
    first = planned.first_tile;
    end = planned.end_tile;
  } else {
    image = block / walk.splits;
    first = (block - image * walk.splits) * walk.tiles_per_split;
    end = first + walk.tiles_per_split;
  }
  const unsigned elements = static_cast<unsigned>(walk.channels) * walk.pixels;  // below 2^31
  const unsigned pixels = walk.pixels;
  const long long channel0 = static_cast<long long>(image) * walk.channels;
  const T* const x = static_cast<const T*>(args.x) + channel0 * pixels;
  T* const out = static_cast<T*>(args.out) + channel0 * pixels;
  const unsigned tile_elements = kRows * kStep * port::block_threads();
  port::wait_for_launch_before<kWaitBroadcastFlat>();
  for (int tile = first; tile < end; ++tile) {
    const unsigned begin = tile * tile_elements + port::thread_index() * kStep;
    PackedVector<T> rows[kRows];
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const unsigned at = begin + r * kStep * port::block_threads();
      if (at < elements) rows[r].template load<kStep>(0, x + at);
    }
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const unsigned at = begin + r * kStep * port::block_threads();
      if (at >= elements) continue;
      unsigned channel = at / pixels;
      unsigned left = pixels - at % pixels;  // of the channel
      A scale = kScale ? read<T>(args.scale, channel0 + channel) : A(1);
      A term = kTerm ? read<T>(args.term, channel0 + channel) : A(0);
      GC_UNROLL
      for (int e = 0; e < kStep; ++e) {
        if (left == 0) {
          ++channel;
          left = pixels;
          if constexpr (kScale) scale = read<T>(args.scale, channel0 + channel);
          if constexpr (kTerm) term = read<T>(args.term, channel0 + channel);
        }
        --left;
        A v = rows[r].get(e);
        if constexpr (kScale) v *= scale;
        if constexpr (kTerm) v += term;
        rows[r].set(e, v);
      }
      rows[r].template store<kStep>(0, out + at);
    }
  }
}

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
broadcast_mul_backward(const BroadcastMulBackwardArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  using Traits = BroadcastMulBackwardTraits;
  static_assert(has_tile<Traits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  port::let_next_launch_begin();
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

  // Of both sums, a row for each partial result.
  const int rows = merged_rows(args.walk.splits, args.walk.group);
  A* const products = static_cast<A*>(args.partial_sums) + map.channels0() * rows;
  A* const grads = products + static_cast<long long>(args.walk.images) * rows * map.channels;
  const auto put = [&](int to, const CompanionOut& result, A* partials, int channel, A sum) {
    if (to != kMergedResult) {
      partials[static_cast<long long>(to) * map.channels + channel] = sum;
    } else {
      write<T>(result, map.channels0() + channel, sum);
    }
  };
  if (map.pixel_thread() == 0) {
    const int to = args.walk.splits == 1 ? kMergedResult : map.split;
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (map.channel(c) >= map.channels) continue;
      put(to, args.grad_scale, products, map.channel(c), sums[c]);
      if (args.grad_term.data != nullptr) put(to, args.grad_term, grads, map.channel(c), sums[kChannels + c]);
    }
  }
  if (args.walk.splits == 1 || args.walk.merged_later) return;
  int* const flag = arena.take<int>(1);
  unsigned* const tickets = args.tickets + map.image_chunk() * merge_tickets(args.walk.splits, args.walk.group);
  const auto add = [&](int first, int count, int to, const CompanionOut& result, A* partials) {
    add_partials(
        map, partials + static_cast<long long>(first) * map.channels, count, [](int) { return A(1); },
        [&](int channel, A sum) { put(to, result, partials, channel, sum); });
  };
  merge_partials(map.split, args.walk.splits, args.walk.group, tickets, flag, [&](int first, int count, int to) {
    add(first, count, to, args.grad_scale, products);
    if (args.grad_term.data != nullptr) add(first, count, to, args.grad_term, grads);
  });
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
