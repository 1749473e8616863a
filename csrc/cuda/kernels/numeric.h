// Element types: what they accumulate in, their 16-byte vectors in registers, and access to companions.
#pragma once

#include "args.h"
#include "port.h"

namespace gc {

template <typename T>
struct AccumulationOf {
  using Type = float;
};
template <>
struct AccumulationOf<double> {
  using Type = double;
};
template <typename T>
using Acc = typename AccumulationOf<T>::Type;

GC_DEVICE float to_acc(float v) { return v; }
GC_DEVICE double to_acc(double v) { return v; }
GC_DEVICE float to_acc(__half v) { return __half2float(v); }
GC_DEVICE float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
GC_DEVICE T from_acc(Acc<T> v) {
  return v;
}
template <>
GC_DEVICE __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
GC_DEVICE __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
inline constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T value[kWidth];
};

// 2, 4, 8 or 16 bytes, whatever they mean.
template <int kBytes>
struct WordOf {
  using Type = Vector<unsigned, kBytes / 4>;
};
template <>
struct WordOf<2> {
  using Type = Vector<unsigned short, 1>;
};
template <int kBytes>
using Word = typename WordOf<kBytes>::Type;

template <typename To, typename From>
GC_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  union Bits {
    GC_DEVICE Bits() {}
    From from;
    To to;
  } bits;
  bits.from = from;
  return bits.to;
}

// 16 bytes of T as four 32-bit registers. Held as an array of T, a half would take a register of its own.
template <typename T>
struct PackedVector {
  unsigned word[kVectorBytes / 4];

  // `i` is a compile-time constant after unrolling.
  GC_DEVICE Acc<T> get(int i) const {
    if constexpr (sizeof(T) == 8) {
      return bit_cast<double>(static_cast<unsigned long long>(word[2 * i + 1]) << 32 | word[2 * i]);
    } else if constexpr (sizeof(T) == 4) {
      return bit_cast<float>(word[i]);
    } else {
      return to_acc(bit_cast<T>(static_cast<unsigned short>(word[i / 2] >> (i % 2 * 16))));
    }
  }
  GC_DEVICE void set(int i, Acc<T> v) {
    if constexpr (sizeof(T) == 8) {
      const auto bits = bit_cast<unsigned long long>(v);
      word[2 * i] = static_cast<unsigned>(bits);
      word[2 * i + 1] = static_cast<unsigned>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      word[i] = bit_cast<unsigned>(v);
    } else {
      set_half_word(i, bit_cast<unsigned short>(from_acc<T>(v)));
    }
  }

  // Moves kWidth elements, those from `first` on.
  template <int kWidth>
  GC_DEVICE void load(int first, const T* address) {
    if constexpr (kWidth * sizeof(T) == 2) {
      set_half_word(first, port::load_global(reinterpret_cast<const Vector<unsigned short, 1>*>(address)).value[0]);
    } else {
      constexpr int kWords = kWidth * sizeof(T) / 4;
      const auto piece = port::load_global(reinterpret_cast<const Vector<unsigned, kWords>*>(address));
      GC_UNROLL
      for (int k = 0; k < kWords; ++k) word[first * sizeof(T) / 4 + k] = piece.value[k];
    }
  }
  template <int kWidth>
  GC_DEVICE void store(int first, T* address) const {
    if constexpr (kWidth * sizeof(T) == 2) {
      const auto bits = static_cast<unsigned short>(word[first / 2] >> (first % 2 * 16));
      port::store_streaming(reinterpret_cast<Vector<unsigned short, 1>*>(address), Vector<unsigned short, 1>{{bits}});
    } else {
      constexpr int kWords = kWidth * sizeof(T) / 4;
      Vector<unsigned, kWords> piece;
      GC_UNROLL
      for (int k = 0; k < kWords; ++k) piece.value[k] = word[first * sizeof(T) / 4 + k];
      port::store_streaming(reinterpret_cast<Vector<unsigned, kWords>*>(address), piece);
    }
  }

 private:
  GC_DEVICE void set_half_word(int i, unsigned short bits) {
    const unsigned other = word[i / 2] & (i % 2 == 0 ? 0xffff0000u : 0xffffu);
    word[i / 2] = other | static_cast<unsigned>(bits) << (i % 2 * 16);
  }
};

template <typename T>
GC_DEVICE Acc<T> read(const Companion& vector, long long i) {
  return vector.wide ? static_cast<const Acc<T>*>(vector.data)[i] : to_acc(static_cast<const T*>(vector.data)[i]);
}

template <typename T>
GC_DEVICE void write(const CompanionOut& vector, long long i, Acc<T> v) {
  if (vector.wide) {
    static_cast<Acc<T>*>(vector.data)[i] = v;
  } else {
    static_cast<T*>(vector.data)[i] = from_acc<T>(v);
  }
}

}  // namespace gc
