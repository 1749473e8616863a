// Two sums over the pixels for each channel, in one sweep over maps of one layout, while what a later sweep needs may be
// written. What is summed is up to a Terms; statistics.h and residual.h have some, whose
// take<kPartial, kStream>(j, count, factor, first, second) adds the terms of the elements from j on to the Lanes of the
// two sums, and fetch(j) those of an element ahead of its use. `factor` is a number of the elements' channels.
//
// Rows are taken one after the other, each with several sums side by side: so what is written is written in the order
// in which it lies in memory, and can go past the caches.
#pragma once

#include "cpu/simd/cascade.h"
#include "cpu/simd/row.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
struct TwoSums {
  A first, second;
};

// Of the elements [begin, end) of one row, which have one factor.
template <bool kStream, typename T, typename Terms>
GC_FLATTEN TwoSums<acc_t<T>> sums_of_row(const Terms& terms, const T* out, int64_t begin, int64_t end,
                                         acc_t<T> factor_of_row) {
  using L = Lanes<T>;
  constexpr int kSideBySide = 4 / L::kVecs;
  const L factor = L::all(factor_of_row);
  L first[kSideBySide], second[kSideBySide];
  GC_UNROLL
  for (int k = 0; k < kSideBySide; ++k) first[k] = second[k] = L::zero();
  int64_t j = begin;
  if constexpr (kStream) {
    const int64_t head = until_aligned(out + begin, end - begin);
    if (head > 0) terms.template take<true, false>(j, static_cast<int>(head), factor, first[0], second[0]);
    j += head;
  }
  for (; j + kSideBySide * L::kWidth <= end; j += kSideBySide * L::kWidth) {
    GC_UNROLL
    for (int k = 0; k < kSideBySide; ++k) {
      terms.template take<false, kStream>(j + k * L::kWidth, L::kWidth, factor, first[k], second[k]);
    }
  }
  for (; j + L::kWidth <= end; j += L::kWidth) {
    terms.template take<false, kStream>(j, L::kWidth, factor, first[0], second[0]);
  }
  if (j < end) terms.template take<true, false>(j, static_cast<int>(end - j), factor, first[0], second[0]);
  GC_UNROLL
  for (int k = 1; k < kSideBySide; ++k) {
    first[0].add(first[k]);
    second[0].add(second[k]);
  }
  return {lane_sum(first[0].sum()), lane_sum(second[0].sum())};
}

// NCHW: the sums over an image's pixels [begin, end) of the channels; factors [C]. A row is summed in pieces: so no sum
// of many terms is one chain, and that of the pieces is in double.
template <bool kStream, typename T, typename Terms>
inline void sums_of_planes(const Terms& terms, const T* out, const Shape& shape, int64_t image, int64_t begin,
                           int64_t end, const acc_t<T>* factors, acc_t<T>* first, acc_t<T>* second) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    const int64_t plane = (image * shape.channels + c) * shape.pixels;
    double of_first = 0, of_second = 0;
    for (int64_t pixel = begin; pixel < end;) {
      int64_t next = std::min(pixel + kMaxTilePixels, end);
      // Pieces meet where a line of out begins.
      if (kStream && next < end) next += until_aligned(out + plane + next, end - next);
      const auto piece = sums_of_row<kStream, T>(terms, out, plane + pixel, plane + next, factors ? factors[c] : 0);
      of_first += piece.first;
      of_second += piece.second;
      pixel = next;
    }
    first[c] = static_cast<acc_t<T>>(of_first);
    if (second) second[c] = static_cast<acc_t<T>>(of_second);
  }
}

// channels_last: the same. A few pixels are added up before their sum goes to the sums in memory, vector by vector, so
// that the maps are read as they lie.
template <bool kStream, typename T, typename Terms>
inline void sums_of_pixels(const Terms& terms, const Shape& shape, int64_t image, int64_t begin, int64_t end,
                           const acc_t<T>* factors, acc_t<T>* first, acc_t<T>* second) {
  using L = Lanes<T>;
  constexpr int kTogether = 4;
  const int64_t channels = shape.channels;
  Sums<acc_t<T>> first_sums(channels), second_sums(channels);
  first_sums.start(first);
  if (second) second_sums.start(second);
  const auto take_rows = [&](int64_t pixel, auto rows) {
    constexpr int kRows = rows.value;
    const int64_t base = (image * shape.pixels + pixel) * channels;
    for_each_vector<L::kWidth>(0, channels, [&](int64_t c, int count, auto partial) {
      L factor = L::zero();
      if (factors) factor = L::template load_wide<partial.value>(factors + c, count);
      L of_first = L::zero(), of_second = L::zero();
      GC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        terms.fetch(base + r * channels + c + kAheadBytes / static_cast<int64_t>(sizeof(T)));
        terms.template take<partial.value, kStream>(base + r * channels + c, count, factor, of_first, of_second);
      }
      of_first.add_to(first + c, count);
      if (second) of_second.add_to(second + c, count);
    });
    first_sums.added();
    if (second) second_sums.added();
  };
  int64_t pixel = begin;
  for (; pixel + kTogether <= end; pixel += kTogether) take_rows(pixel, std::integral_constant<int, kTogether>{});
  for (; pixel < end; ++pixel) take_rows(pixel, std::integral_constant<int, 1>{});
  first_sums.finish();
  if (second) second_sums.finish();
}

// The sums of one split into first[C] and, unless that is null, second[C]. `out` is what the Terms write, or null;
// stream: past the caches.
template <typename T, typename Terms>
inline void channel_sums(const Terms& terms, const T* out, bool stream, const Shape& shape, const Split& split,
                         const acc_t<T>* factors, acc_t<T>* first, acc_t<T>* second) {
  const auto [image, begin, end] = split;
  if (shape.channels_last) {
    // Where not every pixel begins a vector that can be written so, none is.
    const bool aligned = shape.channels * sizeof(T) % kStreamBytes == 0 && until_aligned(out, 1) == 0;
    if (stream && aligned) {
      sums_of_pixels<true, T>(terms, shape, image, begin, end, factors, first, second);
    } else {
      sums_of_pixels<false, T>(terms, shape, image, begin, end, factors, first, second);
    }
  } else if (stream) {
    sums_of_planes<true, T>(terms, out, shape, image, begin, end, factors, first, second);
  } else {
    sums_of_planes<false, T>(terms, out, shape, image, begin, end, factors, first, second);
  }
  if (stream) stream_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
