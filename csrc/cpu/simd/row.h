// One row of an output like x: out[j] = combine(row factors, lane factors[j], in[j]), where `in` may be several maps.
//
// A row is contiguous in memory: a channel's pixels in NCHW, a pixel's channels in channels_last. Factors are numbers
// that belong to the pixels or to the channels. Of the one kind, a row has one number for all its elements (the row
// factors), of the other one number for each element (the lane factors).
#pragma once

#include <array>

#include "cpu/simd/lanes.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, size_t kCount>
using FactorPointers = std::array<const acc_t<T>*, kCount>;

template <typename T, size_t kCount>
using FactorLanes = std::array<Lanes<T>, kCount>;

// Where the maps begin that are read, and a vector of each.
template <typename T, size_t kIn>
using Inputs = std::array<const T*, kIn>;

template <typename T, size_t kIn>
GC_INLINE Inputs<T, kIn> moved(Inputs<T, kIn> in, int64_t offset) {
  GC_UNROLL
  for (size_t k = 0; k < kIn; ++k) in[k] += offset;
  return in;
}

// One map gives its Lanes, several an array of them.
template <bool kPartial, typename T, size_t kIn>
GC_INLINE auto load_inputs(const Inputs<T, kIn>& in, int64_t j, int count) {
  if constexpr (kIn == 1) {
    return Lanes<T>::template load<kPartial>(in[0] + j, count);
  } else {
    std::array<Lanes<T>, kIn> values;
    GC_UNROLL
    for (size_t k = 0; k < kIn; ++k) values[k] = Lanes<T>::template load<kPartial>(in[k] + j, count);
    return values;
  }
}

// Some rows of one image, or the same columns of some rows.
template <typename T, size_t kRow, size_t kLane, size_t kIn>
struct RowRange {
  int64_t rows;
  int64_t columns;
  int64_t stride;                         // from row to row
  FactorPointers<T, kRow> row_factors;    // [rows] each
  FactorPointers<T, kLane> lane_factors;  // [columns] each
  Inputs<T, kIn> in;                      // of the first row
  T* out;                                 // of the first row
};

template <typename T, size_t kCount>
GC_INLINE FactorLanes<T, kCount> row_lanes(const FactorPointers<T, kCount>& factors, int64_t row) {
  FactorLanes<T, kCount> lanes;
  GC_UNROLL
  for (size_t k = 0; k < kCount; ++k) lanes[k] = Lanes<T>::all(factors[k][row]);
  return lanes;
}

template <bool kPartial, typename T, size_t kCount>
GC_INLINE FactorLanes<T, kCount> lane_lanes(const FactorPointers<T, kCount>& factors, int64_t j, int count) {
  FactorLanes<T, kCount> lanes;
  GC_UNROLL
  for (size_t k = 0; k < kCount; ++k) lanes[k] = Lanes<T>::template load_wide<kPartial>(factors[k] + j, count);
  return lanes;
}

// Calls body(index, count, std::bool_constant<partial>) for the vectors of [begin, end). The whole ones are aligned in
// out; a partial one may stand before them and after them.
template <typename T, typename Body>
GC_INLINE void for_each_aligned_vector(const T* out, int64_t begin, int64_t end, const Body& body) {
  const int64_t head = until_aligned(out + begin, end - begin);
  if (head > 0) body(begin, static_cast<int>(head), std::true_type{});
  for_each_vector<Lanes<T>::kWidth>(begin + head, end, body);
}

// Writes the elements [begin, end) of a row. kStream: past the caches, which takes whole aligned vectors, or the line
// is fetched after all. kAhead: the same elements of `next` are fetched meanwhile.
//
// This is a function of its own, and the factors are passed by value: otherwise g++ reads them again after every store,
// and without AVX it hands vectors over in memory.
template <bool kStream, bool kAhead, typename T, size_t kRow, size_t kLane, size_t kIn, typename Combine>
GC_FLATTEN void write_row(FactorLanes<T, kRow> row, FactorPointers<T, kLane> lane_factors, Inputs<T, kIn> in,
                          Inputs<T, kIn> next, T* out, int64_t begin, int64_t end, const Combine& combine) {
  const auto write = [&](int64_t j, int count, auto partial) {
    if constexpr (kAhead) {
      GC_UNROLL
      for (size_t k = 0; k < kIn; ++k) __builtin_prefetch(next[k] + j);
    }
    const auto value = load_inputs<partial.value, T>(in, j, count);
    combine(row, lane_lanes<partial.value, T>(lane_factors, j, count), value)
        .template store<partial.value, kStream>(out + j, count);
  };
  if constexpr (kStream) {
    for_each_aligned_vector(out, begin, end, write);
  } else {
    for_each_vector<Lanes<T>::kWidth>(begin, end, write);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
