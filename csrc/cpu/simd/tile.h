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
//
// All sums can be taken of x - mean in place of x, where mean is a number per channel that is subtracted from each
// element as it is read: where the mean is far larger than the deviations from it, what is summed then is small, too,
// and nothing cancels. A centre is one of x - mean.
#pragma once

#include "cpu/simd/cascade.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

inline constexpr int kAccumulators = 8;  // vectors; half of AVX2's 16 registers are left for operands
inline constexpr int kSums = sizeof(Vec<float>) == 64 ? 16 : 8;  // half of AVX-512's registers, or of AVX2's

// What is subtracted from x[r, j] as it is read: nothing, mean[r] or mean[j].
enum class Less { kNothing, kMeanOfRow, kMeanOfColumn };

// Of kRows rows of x and kCoefs rows of coef:
//
//   lane k * kRows + r of the result = sum_j coef[k, j] * x[r, j]
//
// kCentred: x[r, j] - centre[j] takes the place of x[r, j].
template <int kRows, int kCoefs, bool kCentred = false, Less kLess = Less::kNothing, typename T>
GC_FLATTEN Vec<acc_t<T>> dot_rows(const T* x, int64_t stride, int64_t width, const acc_t<T>* coef, int64_t coef_stride,
                                  const acc_t<T>* centre = nullptr, const acc_t<T>* mean = nullptr) {
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
          L less = L::zero();
          if constexpr (kLess == Less::kMeanOfColumn) less = L::template load_wide<partial.value>(mean + j, count);
          GC_UNROLL_SUMS
          for (int r = 0; r < kRows; ++r) {
            L row = L::template load<partial.value>(x + r * stride + j, count);
            if constexpr (kLess == Less::kMeanOfColumn) row = row.minus(less);
            if constexpr (kLess == Less::kMeanOfRow) row = row.minus(V(mean[r]));
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
template <bool kCentred, Less kLess, typename T, typename Emit>
inline void row_dot(const T* x, int64_t stride, int64_t rows, int64_t width, const acc_t<T>* coef,
                    const acc_t<T>* centre, const acc_t<T>* mean, const Emit& emit) {
  const auto dots = [&](int64_t row, auto count) {
    const acc_t<T>* const own_mean = kLess == Less::kMeanOfRow ? mean + row : mean;
    emit(row, dot_rows<count, 1, kCentred, kLess>(x + row * stride, stride, width, coef, 0, centre, own_mean), count);
  };
  if (width * static_cast<int64_t>(sizeof(T)) < kLongRowBytes) {
    for_each_group<kRowsTogether<T>>(0, rows, dots);
  } else {
    for_each_group<std::min(kLongRowsTogether, kRowsTogether<T>)>(0, rows, dots);
  }
}

// The sums of kVectors vectors of columns, from `column` on; the last vector has `last` elements.
template <int kVectors, bool kPartial, bool kCentred, Less kLess, typename T, typename Emit>
inline void accumulate_vectors(const T* x, int64_t stride, int64_t rows, const acc_t<T>* coef, const acc_t<T>* centre,
                               const acc_t<T>* mean, int64_t column, int last, const Emit& emit) {
  using L = Lanes<T>;
  using V = typename L::V;
  constexpr int kChains = kAccumulators / (kVectors * L::kVecs);
  static_assert(kChains >= 1, "more accumulators than registers");
  L total[kVectors];
  GC_UNROLL_SUMS
  for (int b = 0; b < kVectors; ++b) total[b] = L::zero();
  L of_column[kVectors];
  if constexpr (kLess == Less::kMeanOfColumn) {
    GC_UNROLL_SUMS
    for (int b = 0; b < kVectors - 1; ++b) of_column[b] = L::template load_wide<false>(mean + column + b * L::kWidth);
    const int64_t at = column + (kVectors - 1) * L::kWidth;
    of_column[kVectors - 1] = L::template load_wide<kPartial>(mean + at, last);
  }
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
      const auto add = [&](int b, L value) {
        if constexpr (kLess == Less::kMeanOfRow) value = value.minus(V(mean[r]));
        if constexpr (kLess == Less::kMeanOfColumn) value = value.minus(of_column[b]);
        sum[b].add_product(value, weight);
      };
      GC_UNROLL_SUMS
      for (int b = 0; b < kVectors - 1; ++b) add(b, L::template load<false>(row + b * L::kWidth));
      add(kVectors - 1, L::template load<kPartial>(row + (kVectors - 1) * L::kWidth, last));
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
template <int kVectors, bool kCentred, Less kLess, typename T, typename Emit>
inline void accumulate_columns(const T* x, int64_t stride, int64_t rows, int64_t column, int64_t width,
                               const acc_t<T>* coef, const acc_t<T>* centre, const acc_t<T>* mean, const Emit& emit) {
  constexpr int kWidth = Lanes<T>::kWidth;
  const auto take = [&](auto partial, int last) {
    accumulate_vectors<kVectors, partial.value, kCentred, kLess>(x + column, stride, rows, coef, centre, mean, column,
                                                                 last, emit);
  };
  while (column + kVectors * kWidth <= width) {
    take(std::false_type{}, kWidth);
    column += kVectors * kWidth;
  }
  if (column + (kVectors - 1) * kWidth < width) {
    take(std::true_type{}, static_cast<int>(width - column - (kVectors - 1) * kWidth));
  } else if constexpr (kVectors > 1) {
    accumulate_columns<kVectors / 2, kCentred, kLess>(x, stride, rows, column, width, coef, centre, mean, emit);
  }
}

// Emits sum_r coef[r] * x[r, j] for every column j. kCentred: x[r, j] - centre[r] takes the place of x[r, j].
template <bool kCentred, Less kLess, typename T, typename Emit>
inline void column_accumulate(const T* x, int64_t stride, int64_t rows, int64_t width, const acc_t<T>* coef,
                              const acc_t<T>* centre, const acc_t<T>* mean, const Emit& emit) {
  constexpr int kVectors = kAccumulators / Lanes<T>::kVecs;
  accumulate_columns<kVectors, kCentred, kLess>(x, stride, rows, 0, width, coef, centre, mean, emit);
}

// One tile of an image in either layout. kLessMean: of x - mean.
template <typename T, bool kLessMean = false>
struct Tile {
  const T* x;
  const acc_t<T>* mean;  // [C]
  int64_t channels;
  int64_t pixels;      // in the tile
  int64_t row_stride;  // S, or C if channels_last
  bool channels_last;

  static int64_t offset(const Shape& shape, int64_t image, int64_t pixel) {
    return image * shape.channels * shape.pixels + pixel * (shape.channels_last ? shape.channels : 1);
  }

  Tile(const T* base, const acc_t<T>* mean_of_channels, const Shape& shape, int64_t image, int64_t pixel, int64_t count)
      : x(base + offset(shape, image, pixel)),
        mean(mean_of_channels),
        channels(shape.channels),
        pixels(count),
        row_stride(shape.channels_last ? shape.channels : shape.pixels),
        channels_last(shape.channels_last) {}

  static constexpr Less kOfRow = kLessMean ? Less::kMeanOfRow : Less::kNothing;
  static constexpr Less kOfColumn = kLessMean ? Less::kMeanOfColumn : Less::kNothing;

  // Emits sum_c weight[c] * x[c, p] for every pixel p of the tile.
  template <typename Emit>
  void sum_over_channels(const acc_t<T>* weight, const Emit& emit) const {
    if (channels_last) {
      row_dot<false, kOfColumn>(x, row_stride, pixels, channels, weight, nullptr, mean, emit);
    } else {
      column_accumulate<false, kOfRow>(x, row_stride, channels, pixels, weight, nullptr, mean, emit);
    }
  }

  // Emits sum_c weight[c] * (x[c, p] - centre[c]) for every pixel p of the tile.
  template <typename Emit>
  void sum_over_channels(const acc_t<T>* weight, const acc_t<T>* centre, const Emit& emit) const {
    if (channels_last) {
      row_dot<true, kOfColumn>(x, row_stride, pixels, channels, weight, centre, mean, emit);
    } else {
      column_accumulate<true, kOfRow>(x, row_stride, channels, pixels, weight, centre, mean, emit);
    }
  }

  // Emits sum_p weight[p] * x[c, p] for every channel c.
  template <typename Emit>
  void sum_over_pixels(const acc_t<T>* weight, const Emit& emit) const {
    if (channels_last) {
      column_accumulate<false, kOfColumn>(x, row_stride, pixels, channels, weight, nullptr, mean, emit);
    } else {
      row_dot<false, kOfRow>(x, row_stride, channels, pixels, weight, nullptr, mean, emit);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
