// Sums over a tile: `rows` rows of `width` contiguous elements, `stride` apart.
//
//   NCHW:          a row is a channel, its elements are pixels
//   channels_last: a row is a pixel, its elements are channels
//
//   row_dot            sums along the rows:   sum_j coef[j] * x[r, j]
//   column_accumulate  sums across the rows:  sum_r coef[r] * x[r, j]
//
// A sum over channels is the one or the other, by the layout, and so is a sum over pixels. Results are handed to
// emit(index, vector of sums, count), in ascending index. A sum is made of several chains, each short, that are added
// at the end: that keeps the rounding error at or below that of a blocked matrix product.
//
// Sums over channels can be taken of x - centre, where centre is a number per channel: it takes part as one more pixel,
// whose sum is subtracted from those of the others. It meets the same roundings in the same order as they do, so the
// result for a pixel that equals the centre is an exact 0. That costs less than a subtraction for each element.
#pragma once

#include "cpu/simd/cascade.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

inline constexpr int kAccumulators = 8;  // vectors; half of AVX2's 16 registers are left for operands
inline constexpr int kSums = sizeof(Vec<float>) == 64 ? 16 : 8;  // half of AVX-512's registers, or of AVX2's

// Of kRows rows of x and kCoefs rows of coef:
//
//   lane k * kRows + r of the result = sum_j coef[k, j] * x[r, j]
//
// kCentred: x[r, j] - centre[j] takes the place of x[r, j].
template <int kRows, int kCoefs, bool kCentred = false, typename T>
GC_FLATTEN Vec<acc_t<T>> dot_rows(const T* x, int64_t stride, int64_t width, const acc_t<T>* coef, int64_t coef_stride,
                                  const acc_t<T>* centre = nullptr) {
  using L = Lanes<T>;
  using V = typename L::V;
  static_assert(kCoefs == 1 || !kCentred, "a centre has sums with one row of coef");
  V total(acc_t<T>(0));
  for (int64_t begin = 0; begin < width; begin += kChain * L::kWidth) {
    L acc[kCoefs][kRows];
    L of_centre = L::zero();
    GC_UNROLL_SUMS
    for (int k = 0; k < kCoefs; ++k) {
      GC_UNROLL_SUMS
      for (int r = 0; r < kRows; ++r) acc[k][r] = L::zero();
    }
    for_each_vector<L::kWidth>(
        begin, std::min(width, begin + kChain * L::kWidth), [&](int64_t j, int count, auto partial) {
          L weight[kCoefs];
          GC_UNROLL_SUMS
          for (int k = 0; k < kCoefs; ++k) {
            weight[k] = L::template load_wide<partial.value>(coef + k * coef_stride + j, count);
          }
          if constexpr (kCentred) {
            of_centre.add_product(L::template load_wide<partial.value>(centre + j, count), weight[0]);
          }
          GC_UNROLL_SUMS
          for (int r = 0; r < kRows; ++r) {
            const L row = L::template load<partial.value>(x + r * stride + j, count);
            GC_UNROLL_SUMS
            for (int k = 0; k < kCoefs; ++k) acc[k][r].add_product(row, weight[k]);
          }
        });
    V sums[kCoefs * kRows];
    GC_UNROLL_SUMS
    for (int k = 0; k < kCoefs; ++k) {
      GC_UNROLL_SUMS
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kCentred) acc[k][r] = acc[k][r].minus(of_centre);
        sums[k * kRows + r] = acc[k][r].sum();
      }
    }
    total = total + lane_sums(sums);
  }
  return total;
}

// So many rows have sums that fit the registers.
template <typename T>
inline constexpr int kRowsTogether = std::min(kSums / Lanes<T>::kVecs, Lanes<T>::kVecWidth);
// Long rows, those of a channels_last tile, are read few at a time: a power of two apart, more of them would displace
// each other from the first-level cache.
inline constexpr int64_t kLongRowBytes = 2048;
inline constexpr int kLongRowsTogether = 4;

// Emits sum_j coef[j] * x[r, j] for every row r. kCentred: x[r, j] - centre[j] takes the place of x[r, j].
template <bool kCentred, typename T, typename Emit>
inline void row_dot(const T* x, int64_t stride, int64_t rows, int64_t width, const acc_t<T>* coef,
                    const acc_t<T>* centre, const Emit& emit) {
  const auto dots = [&](int64_t row, auto count) {
    emit(row, dot_rows<count, 1, kCentred>(x + row * stride, stride, width, coef, 0, centre), count);
  };
  if (width * static_cast<int64_t>(sizeof(T)) < kLongRowBytes) {
    for_each_group<kRowsTogether<T>>(0, rows, dots);
  } else {
    for_each_group<std::min(kLongRowsTogether, kRowsTogether<T>)>(0, rows, dots);
  }
}

// The sums of kVectors vectors of columns, from `column` on; the last vector has `last` elements.
template <int kVectors, bool kPartial, bool kCentred, typename T, typename Emit>
inline void accumulate_vectors(const T* x, int64_t stride, int64_t rows, const acc_t<T>* coef, const acc_t<T>* centre,
                               int64_t column, int last, const Emit& emit) {
  using L = Lanes<T>;
  using V = typename L::V;
  constexpr int kChains = kAccumulators / (kVectors * L::kVecs);
  static_assert(kChains >= 1, "more accumulators than registers");
  L total[kVectors];
  GC_UNROLL_SUMS
  for (int b = 0; b < kVectors; ++b) total[b] = L::zero();
  for (int64_t begin = 0; begin < rows; begin += kChain * kChains) {
    const int64_t end = std::min(rows, begin + kChain * kChains);
    L acc[kChains][kVectors];
    V of_centre[kChains];
    GC_UNROLL_SUMS
    for (int c = 0; c < kChains; ++c) {
      of_centre[c] = V(acc_t<T>(0));
      GC_UNROLL_SUMS
      for (int b = 0; b < kVectors; ++b) acc[c][b] = L::zero();
    }
    const auto add_row = [&](int64_t r, L(&sum)[kVectors], V& centre_sum) {
      const V weight(coef[r]);
      const T* row = x + r * stride;
      if constexpr (kCentred) centre_sum = at::vec::fmadd(V(centre[r]), weight, centre_sum);
      GC_UNROLL_SUMS
      for (int b = 0; b < kVectors - 1; ++b) sum[b].add_product(L::template load<false>(row + b * L::kWidth), weight);
      sum[kVectors - 1].add_product(L::template load<kPartial>(row + (kVectors - 1) * L::kWidth, last), weight);
    };
    int64_t r = begin;
    for (; r + kChains <= end; r += kChains) {
      GC_UNROLL_SUMS
      for (int c = 0; c < kChains; ++c) add_row(r + c, acc[c], of_centre[c]);
    }
    for (; r < end; ++r) add_row(r, acc[0], of_centre[0]);
    GC_UNROLL_SUMS
    for (int c = 1; c < kChains; ++c) of_centre[0] = of_centre[0] + of_centre[c];
    GC_UNROLL_SUMS
    for (int b = 0; b < kVectors; ++b) {
      GC_UNROLL_SUMS
      for (int c = 1; c < kChains; ++c) acc[0][b].add(acc[c][b]);
      if constexpr (kCentred) acc[0][b] = acc[0][b].minus(of_centre[0]);
      total[b].add(acc[0][b]);
    }
  }
  GC_UNROLL_SUMS
  for (int b = 0; b < kVectors; ++b) {
    const int count = b == kVectors - 1 ? last : L::kWidth;
    GC_UNROLL_SUMS
    for (int i = 0; i < L::kVecs; ++i) {
      const int n = L::count_in(i, count);
      if (n > 0) emit(column + b * L::kWidth + i * L::kVecWidth, total[b].v[i], n);
    }
  }
}

// Takes kVectors vectors of columns as often as they fit, then goes on with half as many.
template <int kVectors, bool kCentred, typename T, typename Emit>
inline void accumulate_columns(const T* x, int64_t stride, int64_t rows, int64_t column, int64_t width,
                               const acc_t<T>* coef, const acc_t<T>* centre, const Emit& emit) {
  constexpr int kWidth = Lanes<T>::kWidth;
  while (column + kVectors * kWidth <= width) {
    accumulate_vectors<kVectors, false, kCentred>(x + column, stride, rows, coef, centre, column, kWidth, emit);
    column += kVectors * kWidth;
  }
  if (column + (kVectors - 1) * kWidth < width) {
    const int last = static_cast<int>(width - column - (kVectors - 1) * kWidth);
    accumulate_vectors<kVectors, true, kCentred>(x + column, stride, rows, coef, centre, column, last, emit);
  } else if constexpr (kVectors > 1) {
    accumulate_columns<kVectors / 2, kCentred>(x, stride, rows, column, width, coef, centre, emit);
  }
}

// Emits sum_r coef[r] * x[r, j] for every column j. kCentred: x[r, j] - centre[r] takes the place of x[r, j].
template <bool kCentred, typename T, typename Emit>
inline void column_accumulate(const T* x, int64_t stride, int64_t rows, int64_t width, const acc_t<T>* coef,
                              const acc_t<T>* centre, const Emit& emit) {
  accumulate_columns<kAccumulators / Lanes<T>::kVecs, kCentred>(x, stride, rows, 0, width, coef, centre, emit);
}

// One tile of an image in either layout.
template <typename T>
struct Tile {
  const T* x;
  int64_t channels;
  int64_t pixels;      // in the tile
  int64_t row_stride;  // S, or C if channels_last
  bool channels_last;

  static int64_t offset(const Shape& shape, int64_t image, int64_t pixel) {
    return image * shape.channels * shape.pixels + pixel * (shape.channels_last ? shape.channels : 1);
  }

  Tile(const T* base, const Shape& shape, int64_t image, int64_t pixel, int64_t count)
      : x(base + offset(shape, image, pixel)),
        channels(shape.channels),
        pixels(count),
        row_stride(shape.channels_last ? shape.channels : shape.pixels),
        channels_last(shape.channels_last) {}

  // Emits sum_c weight[c] * x[c, p] for every pixel p of the tile.
  template <typename Emit>
  void sum_over_channels(const acc_t<T>* weight, const Emit& emit) const {
    if (channels_last) {
      row_dot<false>(x, row_stride, pixels, channels, weight, nullptr, emit);
    } else {
      column_accumulate<false>(x, row_stride, channels, pixels, weight, nullptr, emit);
    }
  }

  // Emits sum_c weight[c] * (x[c, p] - centre[c]) for every pixel p of the tile.
  template <typename Emit>
  void sum_over_channels(const acc_t<T>* weight, const acc_t<T>* centre, const Emit& emit) const {
    if (channels_last) {
      row_dot<true>(x, row_stride, pixels, channels, weight, centre, emit);
    } else {
      column_accumulate<true>(x, row_stride, channels, pixels, weight, centre, emit);
    }
  }

  // Emits sum_p weight[p] * x[c, p] for every channel c.
  template <typename Emit>
  void sum_over_pixels(const acc_t<T>* weight, const Emit& emit) const {
    if (channels_last) {
      column_accumulate<false>(x, row_stride, pixels, channels, weight, nullptr, emit);
    } else {
      row_dot<false>(x, row_stride, channels, pixels, weight, nullptr, emit);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
