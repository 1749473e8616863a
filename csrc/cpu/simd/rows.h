// Outputs like x, every element written once: out = combine(factors of its pixel, factors of its channel, in).
//
// Rows are channels in NCHW and pixels in channels_last; of the factors, one kind belongs to the row then and the other
// to the lane. A row is written in aligned runs, with part of a run at either end: what goes past the caches has to be
// whole aligned vectors, or its line is fetched after all. Rows too short for that are taken as one, where a run may
// hold the end of a row and the beginning of the next.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/simd/lanes.h"

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

template <typename T, size_t kCount>
using FactorLanes = std::array<Lanes<T>, kCount>;

template <typename T, size_t kPixel, size_t kChannel>
struct WriteArgs {
  Shape shape;
  Factors<acc_t<T>, kPixel> pixel;
  Factors<acc_t<T>, kChannel> channel;
  const T* in;  // like x; null: combine gets zeros
  T* out;       // like x
  bool stream;  // past the caches
};

// Some rows of an image, or a strip of them.
struct Strip {
  int64_t image;
  int64_t row;      // the first
  int64_t rows;     // how many
  int64_t column;   // the first
  int64_t columns;  // how many
  int64_t stride;   // from row to row
  int64_t offset;   // of the first element, in the whole tensor
};

inline Strip strip_of(const Rows& rows, int64_t unit) {
  Strip strip;
  strip.image = unit / rows.units();
  strip.row = unit % rows.groups * rows.group;
  strip.rows = std::min(rows.group, rows.per_image - strip.row);
  strip.column = unit % rows.units() / rows.groups * rows.strip;
  strip.columns = std::min(rows.strip, rows.width - strip.column);
  strip.stride = rows.width;
  strip.offset = (strip.image * rows.per_image + strip.row) * rows.width + strip.column;
  return strip;
}

template <typename A, size_t kCount>
inline std::array<const A*, kCount> from(const Factors<A, kCount>& factors, int64_t image, int64_t index) {
  std::array<const A*, kCount> data;
  for (size_t k = 0; k < kCount; ++k) data[k] = factors[k].data + image * factors[k].image_stride + index;
  return data;
}

template <typename T, size_t kCount>
GC_INLINE FactorLanes<T, kCount> row_lanes(const std::array<const acc_t<T>*, kCount>& data, int64_t row) {
  FactorLanes<T, kCount> lanes;
  GC_UNROLL
  for (size_t k = 0; k < kCount; ++k) lanes[k] = Lanes<T>::all(data[k][row]);
  return lanes;
}

template <bool kPartial, typename T, size_t kCount>
GC_INLINE FactorLanes<T, kCount> lane_lanes(const std::array<const acc_t<T>*, kCount>& data, int64_t j, int count) {
  FactorLanes<T, kCount> lanes;
  GC_UNROLL
  for (size_t k = 0; k < kCount; ++k) lanes[k] = Lanes<T>::template load_wide<kPartial>(data[k] + j, count);
  return lanes;
}

// Calls write(index, count, std::bool_constant<partial>) for runs of [begin, end), the whole ones aligned for out.
template <typename T, typename Write>
GC_INLINE void for_each_aligned_run(const T* out, int64_t begin, int64_t end, const Write& write) {
  const int64_t head = until_aligned(out + begin, end - begin);
  if (head > 0) write(begin, static_cast<int>(head), std::true_type{});
  for_each_run<Lanes<T>::kWidth>(begin + head, end, write);
}

// Columns of a strip that are written for all its rows before the next ones: of the factors along a long row, they stay
// in the first-level cache. Each row is a new place in memory then, so the next one's is fetched ahead.
inline constexpr int64_t kLongRow = 2048;
inline constexpr int64_t kBlockElements = 1024;

inline int64_t block_of(int64_t columns) {
  if (columns <= kLongRow) return columns;
  return divide_up(divide_up(columns, divide_up(columns, kBlockElements)), 32) * 32;
}

template <bool kStream, bool kBlocks, typename T, size_t kRow, size_t kLane, typename Combine>
inline void write_rows(const Strip& strip, const std::array<const acc_t<T>*, kRow>& of_row,
                       const std::array<const acc_t<T>*, kLane>& of_lane, const T* in, T* out, const Combine& combine) {
  using L = Lanes<T>;
  const int64_t columns = strip.columns;
  const int64_t block = kBlocks ? block_of(columns) : columns;
  for (int64_t first = 0; first < columns; first += block) {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const FactorLanes<T, kRow> row = row_lanes<T>(of_row, r);
      const T* const in_row = in + r * strip.stride;
      T* const out_row = out + r * strip.stride;
      // Blocks meet where a line of out begins.
      const int64_t shift = kStream ? until_aligned(out_row, columns) : 0;
      const int64_t begin = first == 0 ? 0 : std::min(first + shift, columns);
      const int64_t end = first + block < columns ? std::min(first + block + shift, columns) : columns;
      const T* const next = r + 1 < strip.rows ? in_row + strip.stride : in + block;
      const auto write = [&](int64_t j, int count, auto partial) {
        if constexpr (kBlocks) __builtin_prefetch(next + j);
        const L value = L::template load<partial.value>(in_row + j, count);
        combine(row, lane_lanes<partial.value, T>(of_lane, j, count), value)
            .template store<partial.value, kStream>(out_row + j, count);
      };
      if constexpr (kStream) {
        for_each_aligned_run(out_row, begin, end, write);
      } else {
        for_each_run<L::kWidth>(begin, end, write);
      }
    }
  }
}

inline constexpr int64_t kShortRow = 256;  // elements

// Rows of Lanes<T>::kWidth to kShortRow elements without gaps between them.
template <bool kStream, typename T, size_t kRow, size_t kLane, typename Combine>
inline void write_short_rows(const Strip& strip, const std::array<const acc_t<T>*, kRow>& of_row,
                             const std::array<const acc_t<T>*, kLane>& of_lane, const T* in, T* out,
                             const Combine& combine) {
  using A = acc_t<T>;
  using L = Lanes<T>;
  // A run that goes on in the next row finds that row's beginning behind the end of its own.
  A cyclic[kLane + 1][kShortRow + L::kWidth];
  std::array<const A*, kLane> lanes;
  for (size_t k = 0; k < kLane; ++k) {
    for (int64_t j = 0; j < strip.columns; ++j) cyclic[k][j] = of_lane[k][j];
    for (int64_t j = 0; j < L::kWidth; ++j) cyclic[k][strip.columns + j] = of_lane[k][j];
    lanes[k] = cyclic[k];
  }
  int64_t r = 0;
  int64_t row_end = strip.columns;
  FactorLanes<T, kRow> row = row_lanes<T>(of_row, 0);
  for_each_aligned_run(out, 0, strip.rows * strip.columns, [&](int64_t i, int count, auto partial) {
    const int64_t column = i - (row_end - strip.columns);
    const L value = L::template load<partial.value>(in + i, count);
    FactorLanes<T, kRow> of_run = row;
    if (i + count >= row_end && r + 1 < strip.rows) {
      const FactorLanes<T, kRow> next = row_lanes<T>(of_row, ++r);
      const int left = static_cast<int>(row_end - i);
      GC_UNROLL
      for (size_t k = 0; k < kRow; ++k) of_run[k] = L::joined(row[k], next[k], left);
      row = next;
      row_end += strip.columns;
    }
    combine(of_run, lane_lanes<partial.value, T>(lanes, column, count), value)
        .template store<partial.value, kStream>(out + i, count);
  });
}

template <bool kPixelRows, bool kStream, typename T, size_t kPixel, size_t kChannel, typename Combine>
inline void write_strips(const WriteArgs<T, kPixel, kChannel>& args, int64_t unit_begin, int64_t unit_end,
                         const Combine& combine) {
  const Rows rows = make_rows(args.shape);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const Strip strip = strip_of(rows, unit);
    // Without an input, its place is taken by out: the value read there is not used.
    T* const out = args.out + strip.offset;
    const T* const in = args.in ? args.in + strip.offset : out;
    const auto pixel = from(args.pixel, strip.image, kPixelRows ? strip.row : strip.column);
    const auto channel = from(args.channel, strip.image, kPixelRows ? strip.column : strip.row);
    if constexpr (kPixelRows) {
      write_rows<kStream, false, T>(strip, pixel, channel, in, out, combine);
    } else {
      const auto swapped = [&](const auto& row, const auto& lane, const auto& x) { return combine(lane, row, x); };
      const bool even = strip.columns * sizeof(T) % kStreamBytes == 0;
      if (strip.columns >= Lanes<T>::kWidth && strip.columns <= kShortRow && strip.columns == strip.stride && !even) {
        write_short_rows<kStream, T>(strip, channel, pixel, in, out, swapped);
      } else if (kPixel > 0 && strip.columns > kLongRow) {
        write_rows<kStream, true, T>(strip, channel, pixel, in, out, swapped);
      } else {
        write_rows<kStream, false, T>(strip, channel, pixel, in, out, swapped);
      }
    }
  }
  if constexpr (kStream) stream_fence();
}

// combine(FactorLanes of the pixels, FactorLanes of the channels, Lanes of in) -> Lanes of out
template <typename T, size_t kPixel, size_t kChannel, typename Combine>
inline void write_units(const WriteArgs<T, kPixel, kChannel>& args, int64_t unit_begin, int64_t unit_end,
                        const Combine& combine) {
  const auto write = [&](auto pixel_rows, auto stream) {
    write_strips<pixel_rows, stream>(args, unit_begin, unit_end, combine);
  };
  const auto write_either = [&](auto pixel_rows) {
    args.stream ? write(pixel_rows, std::true_type{}) : write(pixel_rows, std::false_type{});
  };
  args.shape.channels_last ? write_either(std::true_type{}) : write_either(std::false_type{});
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
