// The bottleneck of the context block, for one or two branches that read the same context, in one launch:
//
//   h = W1 . context + b1;  normalized = (h - mean h) / sqrt(var h + eps);  y = act(norm_weight * normalized +
//   norm_bias) out = gate(W2 . y + b2)
//
// Without a norm (Squeeze-and-Excitation), normalized is h and y = act(h).
//
// context [N, C] -> out [N, C] a branch; W1 [P, C], W2 [C, P]. All sums in the accumulation type.
//
// Decomposition: two phases (phases.h), the products with W1 and those with W2. Both cut rows by images into tiles
// (transform_geometry.h): a warp takes kTileRows rows for up to kManyImages images, and where there are few tiles,
// several warps share the length of the rows. In the second phase every block computes the norm of its tile's images
// for itself.
//
// Moves: W1 and W2 once from memory; context and h from the second-level cache, once for each row of tiles.
#pragma once

#include "transform.h"

namespace gc {

// Sums each value over the warp. Lane l gets the sum of value[scattered_index<kCount>(l)].
template <int kCount, int kMask = 1, typename A, int kSize>
GC_DEVICE A scatter_sums(A (&value)[kSize]) {
  if constexpr (kCount > 1) {  // lanes that differ in kMask share the values out, half of them each
    constexpr int kHalf = kCount / 2;
    const bool upper = (port::thread_index() & kMask) != 0;
    GC_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const A given = upper ? value[i] : value[kHalf + i];
      const A kept = upper ? value[kHalf + i] : value[i];
      value[i] = kept + port::shuffle_xor(given, kMask);
    }
    return scatter_sums<kHalf, kMask * 2>(value);
  } else {
    GC_UNROLL
    for (int mask = kMask; mask < kWarp; mask *= 2) value[0] += port::shuffle_xor(value[0], mask);
    return value[0];
  }
}

template <int kCount>
GC_DEVICE int scattered_index(int lane) {
  int index = 0;
  GC_UNROLL
  for (int half = kCount / 2, mask = 1; half > 0; half /= 2, mask *= 2) index += (lane & mask) != 0 ? half : 0;
  return index;
}

// Two elements, which begin at an even index, moved by one load or by two: kWidth. The one at `end` is read as 0.
template <int kWidth, typename V>
GC_DEVICE Vector<V, 2> load_pair(const V* pair, bool has_second) {
  if constexpr (kWidth == 2) {
    return port::load_global(reinterpret_cast<const Vector<V, 2>*>(pair));
  } else {
    return {pair[0], has_second ? pair[1] : V{}};
  }
}

// Of rows r and images n, the lane's sum over elements begin .. end: that of r * kImages + n = scattered_index(lane).
// Rows and images past the last are read as the last. A lane takes pairs of elements, however they are loaded: what is
// added in which order does not depend on the addresses of the parameters.
template <int kWidth, int kImages, typename W, typename A>
GC_DEVICE A tile_dots(const W* matrix, int rows, int count, const A* vectors, long long stride, int images, int begin,
                      int end) {
  // Loads in flight, as far as registers go.
  constexpr int kVectors = kImages == kFewImages ? 4 : 2;
  [[maybe_unused]] constexpr int kUnroll = sizeof(W) == 2 ? kVectors / 2 : sizeof(W) == 4 ? kVectors : 1;
  constexpr int kSums = kTileRows * kImages;
  A sums[kSums];
  GC_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  GC_UNROLL_BY(kUnroll)
  for (int i = begin + port::thread_index() % kWarp * 2; i < end; i += kWarp * 2) {
    const bool has_second = i + 1 < end;
    Vector<W, 2> weight[kTileRows];
    GC_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const long long row = r < rows ? r : rows - 1;
      weight[r] = load_pair<kWidth>(matrix + row * count + i, has_second);
    }
    GC_UNROLL
    for (int n = 0; n < kImages; ++n) {
      const Vector<A, 2> vector = load_pair<kWidth>(vectors + (n < images ? n : images - 1) * stride + i, has_second);
      GC_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        GC_UNROLL
        for (int k = 0; k < 2; ++k) sums[r * kImages + n] += to_acc(weight[r].value[k]) * vector.value[k];
      }
    }
  }
  return scatter_sums<kSums>(sums);
}

template <typename A>
struct Dots {
  int rows, count;
  const A* vectors;
  long long stride;
  int images, begin, end;

  template <int kWidth, typename W>
  GC_DEVICE A of(const W* matrix) const {
    if (images <= kFewImages)
      return tile_dots<kWidth, kFewImages>(matrix, rows, count, vectors, stride, images, begin, end);
    return tile_dots<kWidth, kManyImages>(matrix, rows, count, vectors, stride, images, begin, end);
  }
};

// One tile of out = matrix . vectors: rows of a matrix [rows, count] by images first_image .. + images.
struct TransformTile {
  int branch;
  int row, first_image, images;  // the block's first row
  int number;                    // of the tile among those of the same images
};

GC_DEVICE TransformTile tile_at(const TransformForwardArgs& args, int phase, int index) {
  const int shares = phase == 0 ? args.shares[0] : args.shares[1];
  TransformTile tile{};
  int tiles = row_tiles(phase == 0 ? args.branch[0].hidden : args.channels, shares);
  const int of_first = tiles * image_tiles(args.images, args.tile_images);
  if (index >= of_first) {
    index -= of_first;
    tile.branch = 1;
    tiles = row_tiles(phase == 0 ? args.branch[1].hidden : args.channels, shares);
  }
  tile.number = index % tiles;
  tile.row = tile.number * kTileRows * (kTransformWarps / shares);
  tile.first_image = index / tiles * args.tile_images;
  tile.images = args.images - tile.first_image < args.tile_images ? args.images - tile.first_image : args.tile_images;
  return tile;
}

GC_DEVICE int tiles_in(const TransformForwardArgs& args, int phase) {
  int tiles = 0;
  for (int b = 0; b < args.branches; ++b) {
    const int hidden = b == 0 ? args.branch[0].hidden : args.branch[1].hidden;
    tiles += phase == 0 ? row_tiles(hidden, args.shares[0]) : row_tiles(args.channels, args.shares[1]);
  }
  return tiles * image_tiles(args.images, args.tile_images);
}

// Calls write(image of the tile, row, matrix[row] . vectors[image]). scratch: [kTransformThreads].
template <typename T, int kWidth, typename Write>
GC_DEVICE void multiply_tile(const TransformTile& tile, const Companion& matrix, int rows, int count,
                             const Acc<T>* vectors, long long stride, int shares, Acc<T>* scratch, const Write& write) {
  using A = Acc<T>;
  constexpr int kPieceStep = 16;  // elements: pieces of a row begin at multiples of this
  const int lane = port::thread_index() % kWarp;
  const int warp = port::thread_index() / kWarp;
  const int share = warp % shares;
  const int row0 = tile.row + warp / shares * kTileRows;
  const int own_rows = rows - row0 < kTileRows ? rows - row0 : kTileRows;
  const int piece = ((count + shares - 1) / shares + kPieceStep - 1) / kPieceStep * kPieceStep;
  const int begin = share * piece;
  const int end = begin + piece < count ? begin + piece : count;
  const bool few = tile.images <= kFewImages;
  A sum = 0;
  if (own_rows > 0) {
    const long long first = static_cast<long long>(row0) * count;
    const Dots<A> dots{own_rows, count, vectors, stride, tile.images, begin, end};
    sum = sizeof(T) == sizeof(A) || matrix.wide ? dots.template of<kWidth>(static_cast<const A*>(matrix.data) + first)
                                                : dots.template of<kWidth>(static_cast<const T*>(matrix.data) + first);
  }
  if (shares > 1) {
    scratch[port::thread_index()] = sum;
    port::sync_block<kSyncTileShares>();
    if (share != 0) return;
    for (int other = 1; other < shares; ++other) sum += scratch[port::thread_index() + other * kWarp];
  }
  const int at = few ? scattered_index<kTileRows * kFewImages>(lane) : scattered_index<kWarp>(lane);
  const int images = few ? kFewImages : kManyImages;
  const int row = row0 + at / images;
  if (lane < kTileRows * images && row < rows && at % images < tile.images) write(at % images, row, sum);
}

// The norm and its activation for the tile's images, a warp an image: y [images, P] in shared memory.
template <typename T>
GC_DEVICE void normalize(const TransformForwardArgs& args, const TransformBranch& branch, const TransformTile& tile,
                         Acc<T>* y) {
  using A = Acc<T>;
  const int lane = port::thread_index() % kWarp;
  for (int i = port::thread_index() / kWarp; i < tile.images; i += kTransformWarps) {
    const int n = tile.first_image + i;
    const long long row0 = static_cast<long long>(n) * branch.hidden;
    const A* const h = static_cast<const A*>(branch.products) + row0;
    A* const own = y + i * branch.hidden;  // a lane reads what it wrote itself
    A mean = 0;
    A inverse_deviation = 1;
    GC_UNROLL_BY(4)
    for (int p = lane; p < branch.hidden; p += kWarp) {
      own[p] = h[p];
      mean += own[p];
    }
    if (branch.norm_weight.data != nullptr) {
      mean = warp_sum(mean) / static_cast<A>(branch.hidden);
      A variance = 0;
      for (int p = lane; p < branch.hidden; p += kWarp) variance += (own[p] - mean) * (own[p] - mean);
      variance = warp_sum(variance) / static_cast<A>(branch.hidden);
      // A variance that overflows gives NaN, as in PyTorch, and not a finite number.
      inverse_deviation = A(1) / port::sqrt(variance + static_cast<A>(args.eps)) + (variance - variance);
    } else {
      mean = 0;
    }
    const bool writer = tile.number == 0;  // every tile has them; one writes them down
    for (int p = lane; p < branch.hidden; p += kWarp) {
      const A normalized = (own[p] - mean) * inverse_deviation;
      own[p] = activate(args.activation, before_activation<T>(branch, normalized, p));
      if (writer) static_cast<A*>(branch.normalized)[row0 + p] = normalized;
    }
    if (writer && lane == 0) static_cast<A*>(branch.inverse_deviation)[n] = inverse_deviation;
  }
}

// kWidth: elements moved by one load of a weight.
template <typename T, int kWidth>
GC_KERNEL(kTransformThreads, 2)
transform_forward(const TransformForwardArgs args) {
  using A = Acc<T>;
  port::SharedArena arena;
  int* const ticket = arena.take<int>(1);
  const int hidden_max = args.branches > 1 && args.branch[1].hidden > args.branch[0].hidden ? args.branch[1].hidden
                                                                                            : args.branch[0].hidden;
  A* const y = arena.take<A>(args.tile_images * hidden_max);
  A* scratch = arena.take<A>(2 * kTransformThreads);
  const Phase phase(args.grid, args.counters, ticket);
  phase.await_previous();

  // Neighbouring tiles, of the same images as far as may be.
  const int tiles = tiles_in(args, phase.number());
  const int first = static_cast<int>(static_cast<long long>(tiles) * phase.block() / phase.blocks());
  const int end = static_cast<int>(static_cast<long long>(tiles) * (phase.block() + 1) / phase.blocks());
  int ready_branch = -1, ready_image = -1;  // whose hidden units are in y
  GC_UNROLL_BY(1)
  for (int index = first; index < end; ++index) {
    const TransformTile tile = tile_at(args, phase.number(), index);
    const TransformBranch branch = tile.branch == 0 ? args.branch[0] : args.branch[1];
    // Two scratch areas in turn: who writes one again has passed the barrier after which nobody reads it.
    A* const own_scratch = scratch + index % 2 * kTransformThreads;
    if (phase.number() == 0) {
      A* const products = static_cast<A*>(branch.products);
      multiply_tile<T, kWidth>(tile, branch.w1, branch.hidden, args.channels,
                               static_cast<const A*>(args.context) + tile.first_image * args.context_stride,
                               args.context_stride, args.shares[0], own_scratch, [&](int i, int p, A sum) {
                                 products[static_cast<long long>(tile.first_image + i) * branch.hidden + p] =
                                     sum + read<T>(branch.b1, p);
                               });
      continue;
    }
    if (ready_branch != tile.branch || ready_image != tile.first_image) {
      if (index > first) port::sync_block<kSyncHiddenDone>();
      normalize<T>(args, branch, tile, y);
      port::sync_block<kSyncHiddenReady>();
      ready_branch = tile.branch;
      ready_image = tile.first_image;
    }
    A* const out = static_cast<A*>(branch.out);
    multiply_tile<T, kWidth>(tile, branch.w2, args.channels, branch.hidden, y, branch.hidden, args.shares[1],
                             own_scratch, [&](int i, int c, A sum) {
                               out[static_cast<long long>(tile.first_image + i) * args.channels + c] =
                                   pass_gate(branch.gate, sum + read<T>(branch.b2, c));
                             });
  }
  phase.finish();
}

}  // namespace gc
