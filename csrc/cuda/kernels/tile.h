// A block's tile of a feature map, held in registers, in either layout; and the reductions over its two thread axes.
//
// Kernels speak of channels and pixels only. `Tile` turns that into rows and elements, so one kernel text serves NCHW
// and channels_last: a sum over channels runs down a thread's rows and then over the slow axis in NCHW, along a
// thread's elements and then over the fast axis in NHWC; a sum over pixels the other way round.
#pragma once

#include "numeric.h"
#include "sites.h"
#include "traits.h"

namespace gc {

// Where a newer path's block stands: by what its plan has worked out, for a division takes some hundred cycles, and the
// first load waits for it. block: image * splits + split.
struct PlannedBlock {
  int image, split;
  int first_tile, end_tile;

  GC_DEVICE PlannedBlock(const Walk& walk, int block) {
    image = static_cast<int>(static_cast<unsigned long long>(block) * walk.reciprocal >> 32);
    split = block - image * walk.splits;
    if (split >= walk.splits) {  // the reciprocal was rounded down
      ++image;
      split -= walk.splits;
    }
    const int longer = walk.longer;
    first_tile = split * walk.tiles_per_split + (split < longer ? split : longer);
    end_tile = first_tile + walk.tiles_per_split + (split < longer);
  }
};

// Where this thread stands: the block's image and split, the thread's own channels and pixels within the block's tile.
// kPlanned: the splits are those of a newer path, see Walk. kPiece: where it is less than kElementsPerRow, a thread's
// elements of a row are pieces of that length, and piece k of a thread lies beside piece k of its neighbour.
template <Layout kLayout, int kRows, int kElementsPerRow, bool kPlanned = false, int kPiece = kElementsPerRow>
struct TileMap {
  static constexpr bool kChannelsFast = channels_are_fast(kLayout);
  static constexpr int kChannels = kChannelsFast ? kElementsPerRow : kRows;  // a thread's
  static constexpr int kPixels = kChannelsFast ? kRows : kElementsPerRow;    // a thread's
  static constexpr bool kNeighbours = kPiece < kElementsPerRow;

  TileShape shape;
  int channels, pixels;      // of the image
  int channel0;              // first channel of the block
  int fast, slow;            // this thread
  int image, split;          // this block
  int first_tile, end_tile;  // of the split

  GC_DEVICE explicit TileMap(const Walk& walk) : TileMap(walk, Planned<kPlanned>()) {}

  // The number of this block among those of its chunk: image * splits + split. Not kept, for it takes a register.
  GC_DEVICE static int block_of(const Walk& walk) {
    return walk.backwards ? port::grid_x() - 1 - port::block_x() : port::block_x();
  }

  // Offsets of the image in [N, C, S], [N, S], [N, C] and [N, C + 2].
  GC_DEVICE long long image0() const { return static_cast<long long>(image) * channels * pixels; }
  GC_DEVICE long long pixels0() const { return static_cast<long long>(image) * pixels; }
  GC_DEVICE long long channels0() const { return static_cast<long long>(image) * channels; }
  GC_DEVICE long long state0() const { return static_cast<long long>(image) * (channels + kStatistics); }
  // The image and chunk as one index.
  GC_DEVICE long long image_chunk() const { return static_cast<long long>(image) * port::grid_y() + port::block_y(); }
  GC_DEVICE int end_channel() const {
    return channel0 + tile_channels() < channels ? channel0 + tile_channels() : channels;
  }

  GC_DEVICE int tile_channels() const { return kChannels * channel_threads(kLayout, shape); }
  GC_DEVICE int tile_pixels() const { return kPixels * pixel_threads(kLayout, shape); }
  GC_DEVICE int channel_thread() const { return kChannelsFast ? fast : slow; }
  GC_DEVICE int pixel_thread() const { return kChannelsFast ? slow : fast; }

  GC_DEVICE int channel(int thread, int i) const {
    if constexpr (kNeighbours && kChannelsFast) return channel0 + in_row(thread, i);
    return channel0 + (kChannelsFast ? thread * kChannels + i : i * shape.slow_threads + thread);
  }
  GC_DEVICE int channel(int i) const { return channel(channel_thread(), i); }
  GC_DEVICE int pixel(int pixel0, int j) const {
    if constexpr (kNeighbours && !kChannelsFast) return pixel0 + in_row(fast, j);
    return pixel0 + (kChannelsFast ? j * shape.slow_threads + slow : fast * kPixels + j);
  }
  // With kNeighbours: where element e of a thread of the fast axis lies in the tile's row.
  GC_DEVICE int in_row(int thread, int e) const {
    return e / kPiece * (shape.fast_threads * kPiece) + thread * kPiece + e % kPiece;
  }

  // The same seen as rows x elements of memory.
  GC_DEVICE int row(int pixel0, int r) const {
    return (kChannelsFast ? pixel0 : channel0) + r * shape.slow_threads + slow;
  }
  GC_DEVICE int rows() const { return kChannelsFast ? pixels : channels; }
  GC_DEVICE int element(int pixel0) const { return (kChannelsFast ? channel0 : pixel0) + fast * kPiece; }
  GC_DEVICE int row_extent() const { return kChannelsFast ? channels : pixels; }

 private:
  template <bool>
  struct Planned {};

  GC_DEVICE TileMap(const Walk& walk, Planned<false>)
      : shape(walk.shape),
        channels(walk.channels),
        pixels(walk.pixels),
        channel0(port::block_y() * tile_channels()),
        fast(port::thread_index() & (walk.shape.fast_threads - 1)),
        slow(port::thread_index() / walk.shape.fast_threads),
        image(block_of(walk) / walk.splits),
        split(block_of(walk) - image * walk.splits),
        first_tile(split * walk.tiles_per_split) {
    const int tiles = (pixels + tile_pixels() - 1) / tile_pixels();
    end_tile = first_tile + walk.tiles_per_split < tiles ? first_tile + walk.tiles_per_split : tiles;
  }
  GC_DEVICE TileMap(const Walk& walk, Planned<true>) : TileMap(walk, PlannedBlock(walk, block_of(walk))) {}
  GC_DEVICE TileMap(const Walk& walk, const PlannedBlock& block)
      : shape(walk.shape),
        channels(walk.channels),
        pixels(walk.pixels),
        channel0(port::block_y() * tile_channels()),
        fast(port::thread_index() & (walk.shape.fast_threads - 1)),
        slow(port::thread_index() >> walk.fast_shift),
        image(block.image),
        split(block.split),
        first_tile(block.first_tile),
        end_tile(block.end_tile) {}
};

// kWidth: the elements moved by one load or store. At the end of a row each of these has a predicate: the width divides
// the row's extent, so none straddles its end.
template <typename T, Layout kLayout, int kRows, int kWidth, bool kPlanned = false, bool kNeighbours = false>
class Tile {
 public:
  using Map = TileMap<kLayout, kRows, kElements<T>, kPlanned, kNeighbours ? kWidth : kElements<T>>;
  static constexpr int kChannels = Map::kChannels;
  static constexpr int kPixels = Map::kPixels;
  static constexpr int kRowElements = kElements<T>;

  GC_DEVICE Acc<T> operator()(int channel, int pixel) const {
    return Map::kChannelsFast ? rows_[pixel].get(channel) : rows_[channel].get(pixel);
  }
  GC_DEVICE void set(int channel, int pixel, Acc<T> v) {
    Map::kChannelsFast ? rows_[pixel].set(channel, v) : rows_[channel].set(pixel, v);
  }

  // To be called between two uses of the whole tile. Without it, the compiler unpacks every half once, keeps the floats
  // for the second use, and runs out of registers.
  GC_DEVICE void keep_packed() {
    if constexpr (sizeof(T) == 2) {
      GC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        GC_UNROLL
        for (int k = 0; k < kVectorBytes / 4; ++k) port::forget(rows_[r].word[k]);
      }
    }
  }

  // What lies outside the image reads as 0.
  GC_DEVICE void load(const T* image, const Map& map, int pixel0) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) load_row(rows_[r], image, map, pixel0, r);
  }
  GC_DEVICE static void load_row(PackedVector<T>& row, const T* image, const Map& map, int pixel0, int r) {
    GC_UNROLL
    for (int k = 0; k < kVectorBytes / 4; ++k) row.word[k] = 0;
    each_access(map, pixel0, r, [&](int e, int offset) { row.template load<kWidth>(e, image + offset); });
  }

  // A tile on its way through shared memory: every thread has places for vectors of its own there, which no other
  // thread reads. So a thread may refill them as soon as it has taken what was there.
  using Place = Vector<unsigned, kVectorBytes / 4>;
  GC_DEVICE static int places() { return kRows * port::block_threads(); }
  GC_DEVICE static void stage(Place* places, const T* image, const Map& map, int pixel0) {
    static_assert(!Map::kNeighbours, "its pieces lie side by side");
    GC_UNROLL_BY(2)  // as a whole, its addresses take registers that a tall tile does not leave
    for (int r = 0; r < kRows; ++r) {
      T* const place = reinterpret_cast<T*>(places + place_of(r));
      const int row = map.row(pixel0, r);
      const int element = map.element(pixel0);
      GC_UNROLL
      for (int e = 0; e < kElements<T>; e += kWidth) {
        if (row < map.rows() && element + e < map.row_extent()) {
          port::stage<kWidth * sizeof(T)>(place + e, image + row * map.row_extent() + element + e);
        } else {
          *reinterpret_cast<Word<kWidth * sizeof(T)>*>(place + e) = {};
        }
      }
    }
  }
  // After port::await_staged.
  GC_DEVICE static void take_row(PackedVector<T>& row, const Place* places, int r) {
    const Place place = places[place_of(r)];
    GC_UNROLL
    for (int k = 0; k < kVectorBytes / 4; ++k) row.word[k] = place.value[k];
  }
  GC_DEVICE void take(const Place* places) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) take_row(rows_[r], places, r);
  }

  // What lies outside the image is not written.
  GC_DEVICE void store_row(T* image, const Map& map, int pixel0, int r) const {
    each_access(map, pixel0, r, [&](int e, int offset) { rows_[r].template store<kWidth>(e, image + offset); });
  }
  GC_DEVICE void store(T* image, const Map& map, int pixel0) const {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) store_row(image, map, pixel0, r);
  }

 private:
  GC_DEVICE static int place_of(int r) { return r * port::block_threads() + port::thread_index(); }

  // Calls body(element within the vector, offset within the image) for the loads or stores of row r inside the image.
  template <typename Body>
  GC_DEVICE static void each_access(const Map& map, int pixel0, int r, const Body& body) {
    unsigned row_step = map.shape.slow_threads;
    port::forget(row_step);  // otherwise every row's offset and predicate would stay in registers from tile to tile
    const int row = map.row(pixel0, 0) + r * static_cast<int>(row_step);
    if (row >= map.rows()) return;
    const int element = map.element(pixel0);
    const int offset = row * map.row_extent() + element;
    [[maybe_unused]] unsigned threads = map.shape.fast_threads;
    if constexpr (Map::kNeighbours) port::forget(threads);  // or else its multiples would
    GC_UNROLL
    for (int e = 0; e < kElements<T>; e += kWidth) {
      if constexpr (Map::kNeighbours) {
        const int step = e * static_cast<int>(threads);
        if (element + step < map.row_extent()) body(e, offset + step);
      } else {
        if (element + e < map.row_extent()) body(e, offset + e);
      }
    }
  }

  PackedVector<T> rows_[kRows];
};

// The tile of an instantiation with these traits.
template <typename Traits, typename T, Layout kLayout, int kRows, int kWidth>
using TileOf = Tile<T, kLayout, kRows, kWidth, has_planned_walk<Traits>(), Traits::kNeighbours>;

// Two areas of scratch that tiles use in turn. One barrier a tile is then enough: a thread that writes an area again
// has passed the barrier of the tile between, after which nobody reads what was there.
template <typename A>
struct ScratchInTurn {
  A* areas;
  int count;  // elements of one

  GC_DEVICE A* of_tile(int tile) const { return areas + (tile & 1) * count; }
};

struct Sum {
  template <typename A>
  GC_DEVICE static A combine(A a, A b) {
    return a + b;
  }
};
struct Max {  // a NaN loses: it reaches the result through the sum, as it does in PyTorch
  template <typename A>
  GC_DEVICE static A combine(A a, A b) {
    return b > a ? b : a;
  }
};

// A thread's own values in shared memory lie side by side. They move 16 bytes at a time where their number allows.
template <int kCount, typename A>
inline constexpr int kSharedStep = kCount % kElements<A> == 0 ? kElements<A> : 1;

template <int kCount, typename A>
GC_DEVICE void read_shared(A (&value)[kCount], const A* source) {
  constexpr int kStep = kSharedStep<kCount, A>;
  GC_UNROLL
  for (int i = 0; i < kCount; i += kStep) {
    const Vector<A, kStep> vector = *reinterpret_cast<const Vector<A, kStep>*>(source + i);
    GC_UNROLL
    for (int k = 0; k < kStep; ++k) value[i + k] = vector.value[k];
  }
}

template <int kCount, typename A>
GC_DEVICE void write_shared(A* target, const A (&value)[kCount]) {
  constexpr int kStep = kSharedStep<kCount, A>;
  GC_UNROLL
  for (int i = 0; i < kCount; i += kStep) {
    Vector<A, kStep> vector;
    GC_UNROLL
    for (int k = 0; k < kStep; ++k) vector.value[k] = value[i + k];
    *reinterpret_cast<Vector<A, kStep>*>(target + i) = vector;
  }
}

// A reduction over the channel threads or the pixel threads of a block, in two steps. publish() combines inside the
// warp and leaves axis_slots() values in scratch; after a barrier of the caller's, collect() combines those in slot
// order. Every thread gets the result, and all get the same bits.
template <bool kOverFast, int kCount, typename Op = Sum>
struct AxisReduce {
  template <typename A, typename Map>
  GC_DEVICE static void publish(const Map& map, A (&value)[kCount], A* scratch) {
    const int thread = port::thread_index();
    const TileShape shape = map.shape;
    const int first = kOverFast ? 1 : shape.fast_threads;
    const int end = kOverFast && shape.fast_threads < kWarp ? shape.fast_threads : kWarp;
    GC_UNROLL_BY(1)
    for (int mask = first; mask < end; mask <<= 1) {
      GC_UNROLL
      for (int i = 0; i < kCount; ++i) value[i] = Op::combine(value[i], port::shuffle_xor(value[i], mask));
    }
    const bool writer = kOverFast ? (thread & (end - 1)) == 0 : (thread & (kWarp - 1)) < shape.fast_threads;
    if (!writer) return;
    const int warp = thread / kWarp;
    const int slot = kOverFast ? map.fast / kWarp : (shape.fast_threads < kWarp ? warp : map.slow);
    write_shared(scratch + (slot * kept(map) + own(map)) * kCount, value);
  }

  template <typename A, typename Map>
  GC_DEVICE static void collect(const Map& map, A (&value)[kCount], const A* scratch) {
    const int slots = axis_slots(kOverFast, map.shape);
    read_shared(value, scratch + own(map) * kCount);
    GC_UNROLL_BY(2)
    for (int slot = 1; slot < slots; ++slot) {
      A other[kCount];
      read_shared(other, scratch + (slot * kept(map) + own(map)) * kCount);
      GC_UNROLL
      for (int i = 0; i < kCount; ++i) value[i] = Op::combine(value[i], other[i]);
    }
  }

 private:
  template <typename Map>
  GC_DEVICE static int kept(const Map& map) {
    return kOverFast ? map.shape.slow_threads : map.shape.fast_threads;
  }
  template <typename Map>
  GC_DEVICE static int own(const Map& map) {
    return kOverFast ? map.slow : map.fast;
  }
};

template <Layout kLayout, int kCount, typename Op = Sum>
using OverChannels = AxisReduce<channels_are_fast(kLayout), kCount, Op>;
template <Layout kLayout, int kCount, typename Op = Sum>
using OverPixels = AxisReduce<!channels_are_fast(kLayout), kCount, Op>;

// Puts a vector over the block's channels into shared memory, in the order in which threads use it. Channel i of thread
// t lies at t * staged_elements(..) + i * kStride, so that a thread reads its own with vector loads; kStride vectors
// lie interleaved. A barrier must follow before it is read.
template <int kStride = 1, typename Map, typename A, typename Source>
GC_DEVICE void stage_channels(const Map& map, A* shared, const Source& source) {
  for (int slot = port::thread_index(); slot < map.tile_channels(); slot += port::block_threads()) {
    const int thread = slot / Map::kChannels, i = slot % Map::kChannels;
    const int channel = map.channel(thread, i);
    shared[thread * staged_elements(Map::kChannels, kStride, sizeof(A)) + i * kStride] =
        channel < map.channels ? source(channel) : A(0);
  }
}

}  // namespace gc
