// How the CPU's work is cut: into tiles and splits, strips, chunks and pieces (README.md says what each is). Everything
// here follows from the shape alone, never from the number of threads: that keeps results bitwise the same on any
// machine with the same instruction set.
//
// The functions are static. Some of the files that call them are compiled for a newer processor than the others, which
// must never be handed their copy of a function.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gc::cpu {

struct Shape {
  int64_t images;
  int64_t channels;
  int64_t pixels;
  bool channels_last;  // memory order [N, S, C] instead of [N, C, S]
};

struct Plan {
  int64_t tile;    // pixels per tile
  int64_t tiles;   // per image; the last one may be short
  int64_t splits;  // per image
};

inline constexpr int64_t kMaxTilePixels = 1024;
inline constexpr int64_t kMaxSplits = 64;
// Tiles of an NCHW tensor are narrow columns, and every row of one is on a page of its own: looking those up costs more
// in narrower tiles, and wider ones leave the second-level cache before they are read again. Measured for float32 at
// 2x1024x50x84, forward + backward on two threads: 64 pixels 5.97 ms, 96 6.10, 128 6.23, 256 6.54; bfloat16 is fastest
// at 96. Up to 680 channels two tiles fit a 1 MiB second-level cache.
inline constexpr int64_t kMinTilePixels = 96;
inline constexpr int64_t kTileBytes = 256 * 1024;
// Channels_last tiles are contiguous however few their pixels; 32 KiB of them stay in the first-level cache.
inline constexpr int64_t kContiguousTileBytes = 32 * 1024;
// Work of one split, at least: below it, the merge costs more than another thread gains.
inline constexpr int64_t kMinSplitBytes = 64 * 1024;

// How an output like x is written: strip by strip, each a few neighbouring rows of an image or, where rows are very
// long, the same range of their columns. A row is contiguous in memory: a channel's pixels, or a pixel's channels
// (channels_last).
struct Strips {
  int64_t image_rows;
  int64_t image_columns;
  int64_t rows;     // of a strip; the last ones may have fewer
  int64_t columns;  // of a strip; the last ones may have fewer
  int64_t down;     // strips below each other
  int64_t across;   // strips beside each other

  int64_t count() const { return down * across; }  // per image: all that are below each other, then those beside them
};

// What is written needs two vectors along the rows, too: those of a strip stay in the second-level cache for all rows.
inline constexpr int64_t kMaxStripColumns = 64 * 1024;
inline constexpr int64_t kStripElements = 8 * 1024;
inline constexpr int64_t kMinStripRows = 8;

// The rows of a linear map's weight that are fetched together, for all images.
inline constexpr int64_t kLinearRows = 16;
// A piece of the weight in the backward pass is so many columns of a chunk of rows. It is read again for every few
// images, so it stays in the second-level cache.
inline constexpr int64_t kPieceColumns = 128;
inline constexpr int64_t kPieceBytes = 64 * 1024;
inline constexpr int64_t kMaxChunks = 32;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline Plan make_plan(const Shape& shape, int64_t element_bytes) {
  const int64_t pixel_bytes = shape.channels * element_bytes;
  int64_t tile = shape.channels_last ? std::max<int64_t>(kContiguousTileBytes / pixel_bytes, 16)
                                     : std::max(kTileBytes / pixel_bytes, kMinTilePixels);
  tile = std::min({tile, kMaxTilePixels, shape.pixels});
  // Even out the tiles, in steps of a cache line of the smallest type.
  const int64_t even = divide_up(shape.pixels, divide_up(shape.pixels, tile));
  tile = std::min(divide_up(even, 32) * 32, tile);

  Plan plan;
  plan.tile = tile;
  plan.tiles = divide_up(shape.pixels, tile);
  const int64_t by_work = divide_up(shape.pixels * pixel_bytes, kMinSplitBytes);
  const int64_t by_images = divide_up(kMaxSplits, std::max<int64_t>(shape.images, 1));
  plan.splits = std::min({plan.tiles, by_work, by_images});
  return plan;
}

// The pixels [begin, end) of an image. Splits are numbered through all images.
struct Split {
  int64_t image;
  int64_t begin;
  int64_t end;
};

static inline Split split_at(const Shape& shape, const Plan& plan, int64_t split) {
  const auto first_pixel = [&](int64_t k) { return k * plan.tiles / plan.splits * plan.tile; };
  const int64_t k = split % plan.splits;
  return {split / plan.splits, first_pixel(k), std::min(first_pixel(k + 1), shape.pixels)};
}

static inline Strips make_strips(const Shape& shape) {
  Strips strips;
  strips.image_rows = shape.channels_last ? shape.pixels : shape.channels;
  strips.image_columns = shape.channels_last ? shape.channels : shape.pixels;
  const int64_t even = divide_up(strips.image_columns, divide_up(strips.image_columns, kMaxStripColumns));
  strips.columns = std::min(divide_up(even, 32) * 32, strips.image_columns);
  strips.across = divide_up(strips.image_columns, strips.columns);
  strips.rows = std::min(std::max(kStripElements / strips.columns, kMinStripRows), strips.image_rows);
  strips.down = divide_up(strips.image_rows, strips.rows);
  return strips;
}

// How a [rows, columns] weight is cut in the backward pass. Every chunk of rows has partial sums of its own.
struct Pieces {
  int64_t chunk_rows;
  int64_t chunks;
  int64_t per_chunk;  // of kPieceColumns columns each

  int64_t count() const { return chunks * per_chunk; }
};

static inline Pieces make_pieces(int64_t rows, int64_t columns, int64_t element_bytes) {
  const int64_t width = std::min(columns, kPieceColumns);
  const int64_t chunk_rows = std::max(kPieceBytes / (width * element_bytes), divide_up(rows, kMaxChunks));
  return {chunk_rows, divide_up(rows, chunk_rows), divide_up(columns, kPieceColumns)};
}

}  // namespace gc::cpu
