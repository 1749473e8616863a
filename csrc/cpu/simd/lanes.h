// One vector type for every dtype: Lanes<T> holds neighbouring elements of type T as one or two at::vec vectors of the
// accumulation type.
//
// This folder is compiled once for each instruction set (see ../capability_*.cpp). Everything in it lives in an inline
// namespace named after the instruction set, as in at::vec, so that the linker never mixes two of them up.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "cpu/kernels.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// Inlines a function and all that it calls: g++ leaves the longer conversions of at::vec as calls, which hand vectors
// over in memory.
#ifdef __GNUC__
#define GC_INLINE __attribute__((always_inline, flatten)) inline
// Makes a function of its own, with all that it calls inlined: its sums stay in registers wherever it is called.
#define GC_FLATTEN __attribute__((noinline, flatten))
#else
#define GC_INLINE inline
#define GC_FLATTEN inline
#endif

// Unrolls a loop over an array of vectors early: otherwise g++ makes a memset of a loop that sets sums to zero, and
// then keeps the sums in memory.
#if defined(__clang__)
#define GC_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define GC_UNROLL _Pragma("GCC unroll 16")
#else
#define GC_UNROLL
#endif

// The same for loops over many sums at once. Where vectors are arrays (SSE2) these loops must stay: without them g++
// takes the arrays apart into single numbers.
#if defined(CPU_CAPABILITY_DEFAULT) && !defined(__aarch64__)
#define GC_UNROLL_SUMS
#else
#define GC_UNROLL_SUMS GC_UNROLL
#endif

template <typename A>
using Vec = at::vec::Vectorized<A>;

// Stores a vector past the caches, to where it is aligned. A kernel that does so ends with stream_fence.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int64_t kStreamBytes = 64;
GC_INLINE void stream(float* p, const Vec<float>& v) { _mm512_stream_ps(p, v); }
GC_INLINE void stream(double* p, const Vec<double>& v) { _mm512_stream_pd(p, v); }
template <typename T>
GC_INLINE void stream(T* p, const Vec<T>& v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v);
}
inline void stream_fence() { _mm_sfence(); }
#elif defined(CPU_CAPABILITY_AVX2)
inline constexpr int64_t kStreamBytes = 32;
GC_INLINE void stream(float* p, const Vec<float>& v) { _mm256_stream_ps(p, v); }
GC_INLINE void stream(double* p, const Vec<double>& v) { _mm256_stream_pd(p, v); }
template <typename T>
GC_INLINE void stream(T* p, const Vec<T>& v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v);
}
inline void stream_fence() { _mm_sfence(); }
#else
inline constexpr int64_t kStreamBytes = 1;
template <typename T>
GC_INLINE void stream(T* p, const Vec<T>& v) {
  v.store(p);
}
inline void stream_fence() {}
#endif

// How many elements from p on, at most `count`, lie before the first that can be streamed to.
template <typename T>
inline int64_t until_aligned(const T* p, int64_t count) {
  const int64_t past = reinterpret_cast<uintptr_t>(p) % kStreamBytes;
  return past == 0 ? 0 : std::min<int64_t>((kStreamBytes - past) / static_cast<int64_t>(sizeof(T)), count);
}

template <bool kPartial, bool kStream, typename T>
GC_INLINE void store_vector(const Vec<T>& raw, T* p, int count) {
  if constexpr (kStream && !kPartial) {
    stream(p, raw);
  } else if constexpr (kPartial) {
    raw.store(p, count);
  } else {
    raw.store(p);
  }
}

template <typename T>
struct Lanes {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int kVecWidth = V::size();
  static constexpr int kVecs = sizeof(A) / sizeof(T);
  static constexpr int kWidth = kVecs * kVecWidth;
  static_assert(Vec<T>::size() == kWidth, "a vector of T must fill kVecs vectors of its accumulation type");

  V v[kVecs];

  static Lanes all(A value) {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) lanes.v[i] = V(value);
    return lanes;
  }

  // How many of `count` elements fall into vector i.
  static constexpr int count_in(int i, int count) {
    const int left = count - i * kVecWidth;
    return left < 0 ? 0 : (left < kVecWidth ? left : kVecWidth);
  }

  static Lanes zero() {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) lanes.v[i] = V(A(0));
    return lanes;
  }

  // kPartial: there are only `count` elements, and the other lanes become zero.
  template <bool kPartial>
  static GC_INLINE Lanes load(const T* p, int count = kWidth) {
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
  static GC_INLINE Lanes load_wide(const A* p, int count = kWidth) {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (kPartial) {
        const int n = count_in(i, count);
        lanes.v[i] = n > 0 ? V::loadu(p + i * kVecWidth, n) : V(A(0));
      } else {
        lanes.v[i] = V::loadu(p + i * kVecWidth);
      }
    }
    return lanes;
  }

  GC_INLINE Vec<T> narrowed() const {
    if constexpr (kVecs == 1) {
      return v[0];
    } else {
      return at::vec::convert_from_float<T>(v[0], v[1]);
    }
  }

  // kStream: past the caches.
  template <bool kPartial, bool kStream = false>
  GC_INLINE void store(T* p, int count = kWidth) const {
    store_vector<kPartial, kStream>(narrowed(), p, count);
  }

  // p[i] = lane i, for the first `count` lanes
  void store_wide(A* p, int count) const {
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int n = count_in(i, count);
      if (n > 0) v[i].store(p + i * kVecWidth, n);
    }
  }

  // p[i] += lane i, for the first `count` lanes
  void add_to(A* p, int count) const {
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int n = count_in(i, count);
      if (n > 0) (V::loadu(p + i * kVecWidth, n) + v[i]).store(p + i * kVecWidth, n);
    }
  }

  void add(const Lanes& other) {
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) v[i] = v[i] + other.v[i];
  }
  // One vector of the accumulation type whose lanes add up to the same.
  V sum() const {
    V total = v[0];
    GC_UNROLL
    for (int i = 1; i < kVecs; ++i) total = total + v[i];
    return total;
  }
  Lanes plus(const Lanes& other) const {
    Lanes lanes = *this;
    lanes.add(other);
    return lanes;
  }
  Lanes plus_product(const Lanes& a, const Lanes& b) const {
    Lanes lanes = *this;
    lanes.add_product(a, b);
    return lanes;
  }
  Lanes times(const Lanes& other) const {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) lanes.v[i] = v[i] * other.v[i];
    return lanes;
  }
  Lanes minus(const Lanes& other) const {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) lanes.v[i] = v[i] - other.v[i];
    return lanes;
  }
  Lanes minus(const V& other) const {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) lanes.v[i] = v[i] - other;
    return lanes;
  }
  // The first `count` lanes are those of `begin`, the others those of `end`.
  static GC_INLINE Lanes joined(const Lanes& begin, const Lanes& end, int count) {
    Lanes lanes;
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const V is_end = V::arange(A(0), A(1)) >= V(static_cast<A>(count - i * kVecWidth));
      lanes.v[i] = V::blendv(begin.v[i], end.v[i], is_end);
    }
    return lanes;
  }
  // *this += a * b
  void add_product(const Lanes& a, const Lanes& b) {
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) v[i] = at::vec::fmadd(a.v[i], b.v[i], v[i]);
  }
  void add_product(const Lanes& a, const V& b) {
    GC_UNROLL
    for (int i = 0; i < kVecs; ++i) v[i] = at::vec::fmadd(a.v[i], b, v[i]);
  }
};

// How far ahead of its use an element is fetched where several rows are read side by side.
inline constexpr int64_t kAheadBytes = 12 * 1024;

// Fetches the lines of a row ahead of its use.
template <typename T>
inline void prefetch_row(const T* row, int64_t width) {
  for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + j);
}

// Calls body(index, count, std::bool_constant<partial>) for each vector of kWidth elements; only the last one may be
// partial.
template <int kWidth, typename Body>
inline void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) body(j, kWidth, std::false_type{});
  if (j < end) body(j, static_cast<int>(end - j), std::true_type{});
}

// The same for kVectors vectors at a time, then for one at a time: body(index, std::integral_constant<vectors>, count
// of the last vector, std::bool_constant<whether that is partial>).
template <int kVectors, int kWidth, typename Body>
inline void for_each_vectors(int64_t end, const Body& body) {
  int64_t j = 0;
  for (; j + kVectors * kWidth <= end; j += kVectors * kWidth) {
    body(j, std::integral_constant<int, kVectors>{}, kWidth, std::false_type{});
  }
  for_each_vector<kWidth>(
      j, end, [&](int64_t i, int count, auto partial) { body(i, std::integral_constant<int, 1>{}, count, partial); });
}

// Calls body(index, std::integral_constant<count>) for groups of kCount, a power of two, then for the rest in ever
// smaller groups.
template <int kCount, typename Body>
inline void for_each_group(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kCount <= end; begin += kCount) body(begin, std::integral_constant<int, kCount>{});
  if constexpr (kCount > 1) {
    if (begin < end) for_each_group<kCount / 2>(begin, end, body);
  }
}

// Lane i of the result is the sum of the lanes of rows[i]; lanes from kCount, a power of two, on repeat the others.
// kFolds: how often the lanes of a vector are halved.
template <int kFolds, int kCount, typename A>
GC_INLINE Vec<A> fold_lanes(const Vec<A> (&rows)[kCount]) {
  if constexpr (kFolds == 0) {
    return rows[0];
  } else {
    constexpr int kLeft = (kCount + 1) / 2;
    Vec<A> folded[kLeft];
    GC_UNROLL_SUMS
    for (int i = 0; i < kLeft; ++i) {
      const auto halves = at::vec::deinterleave2(rows[2 * i], rows[std::min(2 * i + 1, kCount - 1)]);
      folded[i] = halves.first + halves.second;
    }
    return fold_lanes<kFolds - 1>(folded);
  }
}

template <int kCount, typename A>
GC_INLINE Vec<A> lane_sums(const Vec<A> (&rows)[kCount]) {
  constexpr auto log2 = [](int n) {
    int result = 0;
    for (; n > 1; n /= 2) ++result;
    return result;
  };
  return fold_lanes<log2(Vec<A>::size())>(rows);
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
