// One vector type for every dtype: a run of T in memory, held as one or two vectors of the accumulation type.
//
// This folder is compiled once per instruction set (see ../capability_*.cpp). Everything in it lives in an inline
// namespace named after the instruction set, as in at::vec, so that the linker never mixes two of them up.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "cpu/kernels.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
using Vec = at::vec::Vectorized<A>;

template <typename T>
struct Lanes {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int kVecWidth = V::size();
  static constexpr int kVecs = sizeof(A) / sizeof(T);
  static constexpr int kWidth = kVecs * kVecWidth;
  static_assert(Vec<T>::size() == kWidth, "a vector of T must fill kVecs vectors of its accumulation type");

  V v[kVecs];

  // How many of `count` elements fall into vector i.
  static constexpr int part(int count, int i) {
    const int left = count - i * kVecWidth;
    return left < 0 ? 0 : (left < kVecWidth ? left : kVecWidth);
  }

  static Lanes zero() {
    Lanes lanes;
    for (int i = 0; i < kVecs; ++i) lanes.v[i] = V(A(0));
    return lanes;
  }

  // kPartial: only `count` elements are there; the other lanes are zero.
  template <bool kPartial>
  static Lanes load(const T* p, int count = kWidth) {
    Lanes lanes;
    const Vec<T> raw = kPartial ? Vec<T>::loadu(p, count) : Vec<T>::loadu(p);
    if constexpr (kVecs == 1) {
      lanes.v[0] = raw;
    } else {
      const auto wide = at::vec::convert_to_float<T>(raw);
      lanes.v[0] = std::get<0>(wide);
      lanes.v[1] = std::get<1>(wide);
    }
    return lanes;
  }

  template <bool kPartial>
  static Lanes load_wide(const A* p, int count = kWidth) {
    Lanes lanes;
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (kPartial) {
        const int n = part(count, i);
        lanes.v[i] = n > 0 ? V::loadu(p + i * kVecWidth, n) : V(A(0));
      } else {
        lanes.v[i] = V::loadu(p + i * kVecWidth);
      }
    }
    return lanes;
  }

  template <bool kPartial>
  void store(T* p, int count = kWidth) const {
    Vec<T> raw;
    if constexpr (kVecs == 1) {
      raw = v[0];
    } else {
      raw = at::vec::convert_from_float<T>(v[0], v[1]);
    }
    if constexpr (kPartial) {
      raw.store(p, count);
    } else {
      raw.store(p);
    }
  }

  // p[i] += lane i, for the first `count` lanes
  void add_to(A* p, int count) const {
    for (int i = 0; i < kVecs; ++i) {
      const int n = part(count, i);
      if (n > 0) (V::loadu(p + i * kVecWidth, n) + v[i]).store(p + i * kVecWidth, n);
    }
  }

  void add(const Lanes& other) {
    for (int i = 0; i < kVecs; ++i) v[i] = v[i] + other.v[i];
  }
  // *this += a * b
  void add_product(const Lanes& a, const Lanes& b) {
    for (int i = 0; i < kVecs; ++i) v[i] = at::vec::fmadd(a.v[i], b.v[i], v[i]);
  }
  void add_product(const Lanes& a, const V& b) {
    for (int i = 0; i < kVecs; ++i) v[i] = at::vec::fmadd(a.v[i], b, v[i]);
  }
};

// Calls body(index, count, std::bool_constant<partial>) for each run of `width` elements; only the last may be partial.
template <int kWidth, typename Body>
inline void for_each_run(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) body(j, kWidth, std::false_type{});
  if (j < end) body(j, static_cast<int>(end - j), std::true_type{});
}

// Lane i of the result is the sum of the lanes of rows[i]. Destroys rows.
template <typename A>
inline Vec<A> lane_sums(Vec<A>* rows) {
  for (int n = Vec<A>::size(); n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      const auto halves = at::vec::deinterleave2(rows[2 * i], rows[2 * i + 1]);
      rows[i] = halves.first + halves.second;
    }
  }
  return rows[0];
}

// The sum of all lanes, always in the same order.
template <typename A>
inline A lane_sum(const Vec<A>& v) {
  A lanes[Vec<A>::size()];
  v.store(lanes);
  for (int n = Vec<A>::size() / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

template <typename A>
inline A exp_scalar(A value) {
  A lanes[Vec<A>::size()];
  Vec<A>(value).exp().store(lanes);
  return lanes[0];
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
