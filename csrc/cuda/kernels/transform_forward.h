// The bottleneck of the context block, for one or two branches that read the same context, in one launch:
//
//   h          = W1 . context + b1
//   normalized = (h - mean(h)) / sqrt(var(h) + eps)
//   y          = act(norm_weight * normalized + norm_bias)
//   out        = gate(W2 . y + b2)
//
// Without a norm (Squeeze-and-Excitation), normalized is h and y is act(h).
//
// context [N, C] -> out [N, C] of each branch; W1 [P, C], W2 [C, P]. All sums are in the accumulation type.
//
// Decomposition: two phases (phases.h), the products with W1 and those with W2. Both cut rows x images into tiles,
// which blocks take one after the other. In a tile, a warp multiplies a few rows with a few images' vectors; where
// there are few tiles, several warps share the length of the rows. In the second phase every block computes the norm of
// its tile's images for itself. merging_transform_forward has a phase before, which computes the context from the
// partial results of the pooling (late_merge.h).
//
// Moves: W1 and W2 once from memory; context and h from the second-level cache, once for each row of tiles.
#pragma once

#include "late_merge.h"

namespace gc {

// A warp multiplies kTileRows rows of a matrix with up to this many images' vectors at a time, so that whatever it
// fetches of either is used several times.
inline constexpr int kTileRows = 4;
inline constexpr int kFewImages = 2;
inline constexpr int kManyImages = 8;
static_assert(kTileRows * kManyImages == kWarp, "a lane keeps one sum");

// The product with a matrix of so many rows, for all images, is cut into row_tiles() x image_tiles() tiles. `shares`
// warps share the length of a row.
GC_BOTH int tile_rows(int shares) { return kTileRows * (kTransformWarps / shares); }
GC_BOTH int row_tiles(int rows, int shares) { return (rows + tile_rows(shares) - 1) / tile_rows(shares); }
GC_BOTH int image_tiles(int images, int tile_images) { return (images + tile_images - 1) / tile_images; }

template <typename A>
struct TransformForwardShared {
  int* ticket;  // of the phase
  A* y;         // [tile_images, P] in the second phase, of the tile's images
  A* scratch;   // [2, kTransformThreads], see scratch_of()

  // units: images of a tile times hidden units of the larger branch.
  template <typename Arena>
  GC_SHARED TransformForwardShared(Arena& arena, int units)
      : ticket(arena.template take<int>(1)),
        y(arena.template take<A>(units)),
        scratch(arena.template take<A>(2 * kTransformThreads)) {}

  // Tiles use two areas in turn: a thread that writes one again has passed the barrier after which nobody reads it.
  GC_SHARED A* scratch_of(int tile) const { return scratch + tile % 2 * kTransformThreads; }
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
namespace gc {

// Sums each value over the warp. Lane l gets the sum of value[scattered_index<kCount>(l)].
template <int kCount, int kMask = 1, typename A, int kSize>
GC_DEVICE A scatter_sums(A (&value)[kSize]) {
  if constexpr (kCount > 1) {  // of two lanes that differ in kMask, each keeps half of the values
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

// Two elements, which begin at an even index, fetched by one load (kWidth 2) or by two. Without a second element, 0
// stands in its place.
template <int kWidth, typename V>
GC_DEVICE Vector<V, 2> load_pair(const V* pair, bool has_second) {
  if constexpr (kWidth == 2) {
    return port::load_global(reinterpret_cast<const Vector<V, 2>*>(pair));
  } else {
    return {pair[0], has_second ? pair[1] : V{}};
  }
}

// A tile of one branch's product.
struct ProductTile {
  int branch;
  int row, first_image, images;  // row: the block's first
  int number;                    // of the tile among those of the same images and branch
};

// The tiles of a phase's products, in the order of branches, then of images, then of rows. In the first phase a
// branch's matrix is W1, with a row for each hidden unit, in the second W2, with a row for each channel.
class PhaseTiles {
 public:
  GC_DEVICE PhaseTiles(const TransformForwardArgs& args, bool first) : args_(args), first_(first) {}

  GC_DEVICE int shares() const { return first_ ? args_.shares[0] : args_.shares[1]; }
  GC_DEVICE int rows(int branch) const {
    return !first_ ? args_.channels : branch == 0 ? args_.branch[0].hidden : args_.branch[1].hidden;
  }
  GC_DEVICE int count() const {
    int tiles = 0;
    for (int b = 0; b < args_.branches; ++b) {
      tiles += first_ ? row_tiles(rows(b), args_.shares[0]) : row_tiles(rows(b), args_.shares[1]);
    }
    return tiles * image_tiles(args_.images, args_.tile_images);
  }
  GC_DEVICE ProductTile at(int index) const {
    ProductTile tile{};
    int tiles = row_tiles(rows(0), shares());
    const int of_first = tiles * image_tiles(args_.images, args_.tile_images);
    if (index >= of_first) {
      index -= of_first;
      tile.branch = 1;
      tiles = row_tiles(rows(1), shares());
    }
    tile.number = index % tiles;
    tile.row = tile.number * tile_rows(shares());
    tile.first_image = index / tiles * args_.tile_images;
    const int images_left = args_.images - tile.first_image;
    tile.images = images_left < args_.tile_images ? images_left : args_.tile_images;
    return tile;
  }

 private:
  const TransformForwardArgs& args_;
  bool first_;
};

// The product of one branch with the vectors of a tile's images.
template <typename A>
struct Product {
  Companion matrix;  // [rows, count]
  int rows, count;
  int images;
  const A* vectors;  // that of the first image; the next image's begins `stride` elements after it
  long long stride;
  int shares;  // warps that share the length of a row

  // Of `own_rows` rows that begin at `row` and of the tile's images, over elements begin .. end, the lane's sum: that
  // of row r and image n where r * kImages + n = scattered_index(lane). Rows and images past the last are computed as
  // the last. A lane takes pairs of elements, however they are loaded: the order of additions does not depend on the
  // addresses of the parameters.
  template <int kWidth, int kImages, typename W>
  GC_DEVICE A dots_of(const W* row, int own_rows, int begin, int end) const {
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
        const long long own_row = r < own_rows ? r : own_rows - 1;
        weight[r] = load_pair<kWidth>(row + own_row * count + i, has_second);
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

  template <int kWidth, typename W>
  GC_DEVICE A dots(const W* row, int own_rows, int begin, int end) const {
    return images <= kFewImages ? dots_of<kWidth, kFewImages>(row, own_rows, begin, end)
                                : dots_of<kWidth, kManyImages>(row, own_rows, begin, end);
  }
};

// Calls write(image, row, matrix[row] . vectors[image]) for the images and the rows of the tile that begins at
// tile_row. scratch: [kTransformThreads].
template <typename T, int kWidth, typename Write>
GC_DEVICE void multiply_tile(const Product<Acc<T>>& product, int tile_row, Acc<T>* scratch, const Write& write) {
  using A = Acc<T>;
  constexpr int kShareStep = 16;  // elements: the shares of a row begin at multiples of this
  const int lane = port::thread_index() % kWarp;
  const int warp = port::thread_index() / kWarp;
  const int shares = product.shares;
  const int share = warp % shares;
  const int length = ((product.count + shares - 1) / shares + kShareStep - 1) / kShareStep * kShareStep;
  const int row0 = tile_row + warp / shares * kTileRows;  // the warp's first

  const int own_rows = product.rows - row0 < kTileRows ? product.rows - row0 : kTileRows;
  const int begin = share * length;
  const int end = begin + length < product.count ? begin + length : product.count;
  A sum = 0;
  if (own_rows > 0) {
    const long long first = static_cast<long long>(row0) * product.count;
    const void* const matrix = product.matrix.data;
    sum = sizeof(T) == sizeof(A) || product.matrix.wide
              ? product.template dots<kWidth>(static_cast<const A*>(matrix) + first, own_rows, begin, end)
              : product.template dots<kWidth>(static_cast<const T*>(matrix) + first, own_rows, begin, end);
  }
  if (shares > 1) {
    scratch[port::thread_index()] = sum;
    port::sync_block<kSyncTileShares>();
    if (share != 0) return;
    for (int other = 1; other < shares; ++other) sum += scratch[port::thread_index() + other * kWarp];
  }
  const bool few = product.images <= kFewImages;
  const int index = few ? scattered_index<kTileRows * kFewImages>(lane) : scattered_index<kWarp>(lane);
  const int images = few ? kFewImages : kManyImages;
  const int row = row0 + index / images;
  const int image = index % images;
  if (lane < kTileRows * images && row < product.rows && image < product.images) write(image, row, sum);
}

// The norm and the activation for the tile's images, of which a warp takes one at a time. y: [images, P], shared
// memory.
template <typename T>
GC_DEVICE void normalize(const TransformForwardArgs& args, const TransformBranch& branch, const ProductTile& tile,
                         Acc<T>* y) {
  using A = Acc<T>;
  const int lane = port::thread_index() % kWarp;
  for (int i = port::thread_index() / kWarp; i < tile.images; i += kTransformWarps) {
    const int n = tile.first_image + i;
    const long long row0 = static_cast<long long>(n) * branch.hidden;
    const A* const h = static_cast<const A*>(branch.products) + row0;
    A* const own = y + i * branch.hidden;  // a lane reads only what it wrote itself
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
    const bool writer = tile.number == 0;  // every tile computes these values; the first one writes them to memory
    for (int p = lane; p < branch.hidden; p += kWarp) {
      const A normalized = (own[p] - mean) * inverse_deviation;
      own[p] = activate(args.activation, before_activation<T>(branch, normalized, p));
      if (writer) static_cast<A*>(branch.normalized)[row0 + p] = normalized;
    }
    if (writer && lane == 0) static_cast<A*>(branch.inverse_deviation)[n] = inverse_deviation;
  }
}

// A phase of products: with W1 in phase first_product, with W2 in the next.
template <typename T, int kWidth>
GC_DEVICE void multiply_tiles(const TransformForwardArgs& args, const Phase& phase, int first_product,
                              const TransformForwardShared<Acc<T>>& shared) {
  using A = Acc<T>;
  const PhaseTiles tiles(args, phase.number() == first_product);
  const int count = tiles.count();
  // A block takes neighbouring tiles, which have the same images as far as possible.
  const int first = static_cast<int>(static_cast<long long>(count) * phase.block() / phase.blocks());
  const int end = static_cast<int>(static_cast<long long>(count) * (phase.block() + 1) / phase.blocks());
  int ready_branch = -1, ready_image = -1;  // whose hidden units are in y
  GC_UNROLL_BY(1)
  for (int index = first; index < end; ++index) {
    const ProductTile tile = tiles.at(index);
    const TransformBranch branch = tile.branch == 0 ? args.branch[0] : args.branch[1];
    A* const scratch = shared.scratch_of(index);
    Product<A> product;
    product.images = tile.images;
    if (phase.number() == first_product) {
      product.matrix = branch.w1;
      product.rows = branch.hidden;
      product.count = args.channels;
      product.vectors = static_cast<const A*>(args.context) + tile.first_image * args.context_stride;
      product.stride = args.context_stride;
      product.shares = args.shares[0];
      A* const products = static_cast<A*>(branch.products);
      multiply_tile<T, kWidth>(product, tile.row, scratch, [&](int i, int p, A sum) {
        products[static_cast<long long>(tile.first_image + i) * branch.hidden + p] = sum + read<T>(branch.b1, p);
      });
    } else {
      if (ready_branch != tile.branch || ready_image != tile.first_image) {
        if (index > first) port::sync_block<kSyncHiddenDone>();
        normalize<T>(args, branch, tile, shared.y);
        port::sync_block<kSyncHiddenReady>();
        ready_branch = tile.branch;
        ready_image = tile.first_image;
      }
      product.matrix = branch.w2;
      product.rows = args.channels;
      product.count = branch.hidden;
      product.vectors = shared.y;
      product.stride = branch.hidden;
      product.shares = args.shares[1];
      A* const out = static_cast<A*>(branch.out);
      multiply_tile<T, kWidth>(product, tile.row, scratch, [&](int i, int c, A sum) {
        out[static_cast<long long>(tile.first_image + i) * args.channels + c] =
            pass_gate(branch.gate, sum + read<T>(branch.b2, c));
      });
    }
  }
}

// kMerging: with the merge of the partial results as the first phase.
template <typename T, int kWidth, bool kMerging>
GC_DEVICE void transform_phases(const TransformForwardArgs& args) {
  using A = Acc<T>;
  const int hidden_max = args.branches > 1 && args.branch[1].hidden > args.branch[0].hidden ? args.branch[1].hidden
                                                                                            : args.branch[0].hidden;
  port::let_next_launch_begin();
  port::SharedArena arena;
  const TransformForwardShared<A> shared(arena, args.tile_images * hidden_max);
  if constexpr (port::kLaunchesOverlap) prefetch_share(args.prefetches);
  port::wait_for_launch_before<kWaitTransformForward>();
  const Phase phase(args.grid, args.counters, shared.ticket);
  phase.await_previous();
  if (kMerging && phase.number() == 0) {
    merge_late(args.partial, args.images, args.channels, phase.block(), phase.blocks(), shared.scratch);
  } else {
    const int first_product = kMerging ? args.grid.phases - 2 : 0;  // the phase; the second product is the last
    multiply_tiles<T, kWidth>(args, phase, first_product, shared);
  }
  phase.finish();
}

// kWidth: elements moved by one load of a weight.
template <typename T, int kWidth>
GC_KERNEL(kTransformThreads, 2)
transform_forward(const TransformForwardArgs args) {
  transform_phases<T, kWidth, false>(args);
}

template <typename T, int kWidth>
GC_KERNEL(kTransformThreads, 2)
merging_transform_forward(const TransformForwardArgs args) {
  transform_phases<T, kWidth, true>(args);
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
