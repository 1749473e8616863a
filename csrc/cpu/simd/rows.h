// Outputs like x, every element written once:
//
//   out[n, c, s] = combine(pixel factors[n, s], channel factors[n, c], in[n, c, s])
//
// `in` is one map, or several.
//
// Rows are channels in NCHW and pixels in channels_last (row.h). A strip of them is written in one of three ways: row
// by row; long rows a range of columns at a time (below); short rows as if they were one (short_rows.h).
#pragma once

#include <algorithm>

#include "cpu/simd/row.h"
#include "cpu/simd/short_rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// A number per pixel or per channel.
template <typename A>
struct Factor {
  const A* data;         // [N, S] or [N, C]
  int64_t image_stride;  // 0: the same for all images
};

template <typename A, size_t kCount>
using Factors = std::array<Factor<A>, kCount>;

template <typename T, size_t kIn = 1>
struct WriteArgs {
  Shape shape;
  Inputs<T, kIn> in;  // like x; null: combine gets values that it must not use
  T* out;             // like x
  bool stream;        // past the caches
  int64_t strip_begin;
  int64_t strip_end;
};

template <bool kStream, typename T, size_t kRow, size_t kLane, size_t kIn, typename Combine>
inline void write_rows(const RowRange<T, kRow, kLane, kIn>& range, const Combine& combine) {
  for (int64_t r = 0; r < range.rows; ++r) {
    const int64_t offset = r * range.stride;
    const Inputs<T, kIn> in = moved<T>(range.in, offset);
    write_row<kStream, false, T>(row_lanes<T>(range.row_factors, r), range.lane_factors, in, in, range.out + offset, 0,
                                 range.columns, combine);
  }
}

// Of long rows, some columns are written for all rows before the next ones: of their lane factors, so many stay in the
// first-level cache. Each row is a new place in memory then, so the next one's is fetched ahead.
inline constexpr int64_t kLongRow = 2048;
inline constexpr int64_t kColumnsTogether = 1024;

template <bool kStream, typename T, size_t kRow, size_t kLane, size_t kIn, typename Combine>
inline void write_long_rows(const RowRange<T, kRow, kLane, kIn>& range, const Combine& combine) {
  const int64_t columns = range.columns;
  const int64_t together = divide_up(divide_up(columns, divide_up(columns, kColumnsTogether)), 32) * 32;
  for (int64_t first = 0; first < columns; first += together) {
    for (int64_t r = 0; r < range.rows; ++r) {
      const Inputs<T, kIn> in = moved<T>(range.in, r * range.stride);
      T* const out = range.out + r * range.stride;
      const Inputs<T, kIn> next = r + 1 < range.rows ? moved<T>(in, range.stride) : moved<T>(range.in, together);
      // Ranges of columns meet where a line of out begins.
      const int64_t shift = kStream ? until_aligned(out, columns) : 0;
      const int64_t begin = first == 0 ? 0 : std::min(first + shift, columns);
      const int64_t end = first + together < columns ? std::min(first + together + shift, columns) : columns;
      write_row<kStream, true, T>(row_lanes<T>(range.row_factors, r), range.lane_factors, in, next, out, begin, end,
                                  combine);
    }
  }
}

template <typename T, size_t kCount>
inline FactorPointers<T, kCount> factors_at(const Factors<acc_t<T>, kCount>& factors, int64_t image, int64_t index) {
  FactorPointers<T, kCount> data;
  for (size_t k = 0; k < kCount; ++k) data[k] = factors[k].data + image * factors[k].image_stride + index;
  return data;
}

// The rows of a strip, numbered through all images.
template <typename T, size_t kRow, size_t kLane, size_t kIn>
inline RowRange<T, kRow, kLane, kIn> rows_of(const Strips& strips, int64_t strip, const Factors<acc_t<T>, kRow>& of_row,
                                             const Factors<acc_t<T>, kLane>& of_lane, const Inputs<T, kIn>& in,
                                             T* out) {
  const int64_t image = strip / strips.count();
  const int64_t row = strip % strips.down * strips.rows;
  const int64_t column = strip % strips.count() / strips.down * strips.columns;
  const int64_t offset = (image * strips.image_rows + row) * strips.image_columns + column;
  RowRange<T, kRow, kLane, kIn> range;
  range.rows = std::min(strips.rows, strips.image_rows - row);
  range.columns = std::min(strips.columns, strips.image_columns - column);
  range.stride = strips.image_columns;
  range.row_factors = factors_at<T>(of_row, image, row);
  range.lane_factors = factors_at<T>(of_lane, image, column);
  range.out = out + offset;
  for (size_t k = 0; k < kIn; ++k) range.in[k] = in[k] ? in[k] + offset : range.out;
  return range;
}

template <bool kStream, typename T, size_t kIn, size_t kPixel, size_t kChannel, typename Combine>
inline void write_strips(const WriteArgs<T, kIn>& args, const Factors<acc_t<T>, kPixel>& pixel,
                         const Factors<acc_t<T>, kChannel>& channel, const Combine& combine) {
  const Strips strips = make_strips(args.shape);
  const auto combine_nchw = [&](const auto& row, const auto& lane, const auto& in) { return combine(lane, row, in); };
  for (int64_t strip = args.strip_begin; strip < args.strip_end; ++strip) {
    if (args.shape.channels_last) {
      write_rows<kStream>(rows_of(strips, strip, pixel, channel, args.in, args.out), combine);
      continue;
    }
    const auto range = rows_of(strips, strip, channel, pixel, args.in, args.out);
    if (are_short(range)) {
      write_short_rows<kStream>(range, combine_nchw);
    } else if (kPixel > 0 && range.columns > kLongRow) {
      write_long_rows<kStream>(range, combine_nchw);
    } else {
      write_rows<kStream>(range, combine_nchw);
    }
  }
  if constexpr (kStream) stream_fence();
}

// combine(FactorLanes of the pixels, FactorLanes of the channels, Lanes of in) -> Lanes of out
template <typename T, size_t kIn, size_t kPixel, size_t kChannel, typename Combine>
inline void write_like_x(const WriteArgs<T, kIn>& args, const Factors<acc_t<T>, kPixel>& pixel,
                         const Factors<acc_t<T>, kChannel>& channel, const Combine& combine) {
  if (args.stream) {
    write_strips<true>(args, pixel, channel, combine);
  } else {
    write_strips<false>(args, pixel, channel, combine);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
