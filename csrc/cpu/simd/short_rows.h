// Rows that are too short to be written one by one: most of their vectors would be partial ones. Rows that lie next to
// each other in memory are written as if they were one, and a vector may hold the end of a row and the beginning of the
// next.
#pragma once

#include "cpu/simd/row.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

inline constexpr int64_t kShortRow = 256;  // elements

// Rows that fill whole aligned vectors gain nothing. Those below one vector are left alone as well: a vector could
// hold more than two of them.
template <typename T, size_t kRow, size_t kLane, size_t kIn>
inline bool are_short(const RowRange<T, kRow, kLane, kIn>& range) {
  return range.columns >= Lanes<T>::kWidth && range.columns <= kShortRow && range.columns == range.stride &&
         range.columns * sizeof(T) % kStreamBytes != 0;
}

template <bool kStream, typename T, size_t kRow, size_t kLane, size_t kIn, typename Combine>
inline void write_short_rows(const RowRange<T, kRow, kLane, kIn>& range, const Combine& combine) {
  using L = Lanes<T>;
  // The lane factors, and their beginning once more: a vector that goes on in the next row finds its factors there.
  acc_t<T> cyclic[kLane + 1][kShortRow + L::kWidth];
  FactorPointers<T, kLane> lane_factors;
  for (size_t k = 0; k < kLane; ++k) {
    for (int64_t j = 0; j < range.columns; ++j) cyclic[k][j] = range.lane_factors[k][j];
    for (int64_t j = 0; j < L::kWidth; ++j) cyclic[k][range.columns + j] = range.lane_factors[k][j];
    lane_factors[k] = cyclic[k];
  }
  int64_t r = 0;
  int64_t row_end = range.columns;
  FactorLanes<T, kRow> row = row_lanes<T>(range.row_factors, 0);
  for_each_aligned_vector(range.out, 0, range.rows * range.columns, [&](int64_t i, int count, auto partial) {
    const int64_t column = i - (row_end - range.columns);
    const auto value = load_inputs<partial.value, T>(range.in, i, count);
    FactorLanes<T, kRow> factors = row;
    if (i + count >= row_end && r + 1 < range.rows) {
      const FactorLanes<T, kRow> next = row_lanes<T>(range.row_factors, ++r);
      const int left = static_cast<int>(row_end - i);
      GC_UNROLL
      for (size_t k = 0; k < kRow; ++k) factors[k] = L::joined(row[k], next[k], left);
      row = next;
      row_end += range.columns;
    }
    combine(factors, lane_lanes<partial.value, T>(lane_factors, column, count), value)
        .template store<partial.value, kStream>(range.out + i, count);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
