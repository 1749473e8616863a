// How the pixels of an image are cut on the CPU: tiles that stay in cache between two readings, and splits, each a run
// of whole tiles that one thread works through. Everything here follows from the shape alone, never from the number of
// threads: that keeps results bitwise the same on any machine with the same instruction set.
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

  int64_t split_begin(int64_t split) const { return split * tiles / splits * tile; }
};

inline constexpr int64_t kMaxTilePixels = 1024;
inline constexpr int64_t kMaxSplits = 64;
// Tiles of an NCHW tensor are narrow columns. Every row of a tile is on a page of its own: below 256 pixels, looking up
// pages costs more than what is read twice costs from the third-level cache (backward at 2048x25x42: 64 pixels 4.1 ms,
// 128 3.7, 256 3.5, 512 3.5). Up to 256 channels two tiles fit a 1 MiB second-level cache.
inline constexpr int64_t kMinTilePixels = 256;
inline constexpr int64_t kTileBytes = 256 * 1024;
// Channels_last tiles are contiguous however few their pixels; 32 KiB of them stay in the first-level cache.
inline constexpr int64_t kContiguousTileBytes = 32 * 1024;
// Work of one split, at least: below it, the merge costs more than another thread gains.
inline constexpr int64_t kMinSplitBytes = 64 * 1024;

// The rows of a linear map that are fetched together, for all images.
inline constexpr int64_t kLinearRows = 16;
// A chunk of rows of its backward pass: read once for each image, so it stays in the second-level cache.
inline constexpr int64_t kChunkBytes = 128 * 1024;
inline constexpr int64_t kMaxChunks = 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan make_plan(const Shape& shape, int64_t element_bytes) {
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

// Rows per chunk; whole groups of kLinearRows.
inline int64_t chunk_rows(int64_t rows, int64_t columns, int64_t element_bytes) {
  const int64_t wanted = std::max(kChunkBytes / (columns * element_bytes), divide_up(rows, kMaxChunks));
  return divide_up(wanted, kLinearRows) * kLinearRows;
}

}  // namespace gc::cpu
