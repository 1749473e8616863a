// The last step of the residual tail, and the first of its backward pass:
//
//   out[c, s]   = relu((y[c, s] - mean[c]) * slope[c] + shift[c] + identity[c, s])
//
//   grad_in[c, s]   = grad[c, s] where out[c, s] is not below or at 0
//   sums[c]         = sum_s grad_in[c, s]
//   product_sums[c] = sum_s grad_in[c, s] * (y[c, s] - mean[c])
//
// mean is subtracted first: where it is far larger than the deviations from it, y * slope + (shift - mean * slope) would
// cancel. Every element is read once and written once.
#pragma once

#include <limits>

#include "cpu/simd/channel_sums.h"
#include "cpu/simd/rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
GC_INLINE Lanes<T> at_least(Lanes<T> value, const Vec<acc_t<T>>& floor) {
  GC_UNROLL
  for (int i = 0; i < Lanes<T>::kVecs; ++i) value.v[i] = at::vec::maximum(value.v[i], floor);  // NaN stays NaN
  return value;
}

template <typename T>
void residual(const ResidualArgs<T>& args, int64_t strip_begin, int64_t strip_end) {
  using A = acc_t<T>;
  const auto write = [&](auto inputs, const auto& combine) {
    WriteArgs<T, std::tuple_size_v<decltype(inputs)>> write{};
    write.shape = args.shape;
    write.in = inputs;
    write.out = args.out;
    write.stream = args.stream;
    write.strip_begin = strip_begin;
    write.strip_end = strip_end;
    const int64_t channels = args.shape.channels;
    const Factors<A, 0> none{};
    const Factor<A> mean{args.mean, 0}, slope{args.slope, channels}, shift{args.shift, channels};
    write_like_x(write, none, Factors<A, 3>{mean, slope, shift}, combine);
  };
  const Vec<A> floor(args.relu ? A(0) : -std::numeric_limits<A>::infinity());
  const auto normalized = [](const auto& channel, const Lanes<T>& y) {
    return channel[2].plus_product(y.minus(channel[0]), channel[1]);
  };
  if (args.identity) {
    write(Inputs<T, 2>{args.y, args.identity}, [=](const auto&, const auto& channel, const auto& in) {
      return at_least<T>(normalized(channel, in[0]).plus(in[1]), floor);
    });
  } else {
    write(Inputs<T, 1>{args.y},
          [=](const auto&, const auto& channel, const auto& y) { return at_least<T>(normalized(channel, y), floor); });
  }
}

// kMasked: there is a ReLU, and grad_in is written; else it is grad itself. kProducts: y is read.
template <typename T, bool kMasked, bool kProducts>
struct ResidualTerms {
  const ResidualSumsArgs<T>& args;

  GC_INLINE void fetch(int64_t j) const {
    __builtin_prefetch(args.grad + j);
    if constexpr (kMasked) __builtin_prefetch(args.out + j);
    if constexpr (kProducts) __builtin_prefetch(args.y + j);
  }

  template <bool kPartial, bool kStream>
  GC_INLINE void take(int64_t j, int count, const Lanes<T>& mean, Lanes<T>& first, Lanes<T>& second) const {
    using L = Lanes<T>;
    using V = typename L::V;
    L grad = L::template load<kPartial>(args.grad + j, count);
    if constexpr (kMasked) {
      const L out = L::template load<kPartial>(args.out + j, count);
      const V zero(acc_t<T>(0));
      GC_UNROLL
      for (int i = 0; i < L::kVecs; ++i) grad.v[i] = V::blendv(grad.v[i], zero, out.v[i] <= zero);  // not for NaN
      grad.template store<kPartial, kStream>(args.grad_in + j, count);
    }
    first.add(grad);
    if constexpr (kProducts) second.add_product(grad, L::template load<kPartial>(args.y + j, count).minus(mean));
  }
};

template <typename T>
void residual_sums(const ResidualSumsArgs<T>& args, int64_t split_begin, int64_t split_end) {
  const Shape& shape = args.shape;
  const auto sum = [&](auto masked, auto products) {
    const ResidualTerms<T, masked.value, products.value> terms{args};
    for (int64_t k = split_begin; k < split_end; ++k) {
      const Split split = split_at(shape, args.plan, k);
      const acc_t<T>* const mean = products.value ? args.mean + split.image * args.mean_stride : nullptr;
      channel_sums<T>(terms, args.grad_in, masked.value && args.stream, shape, split, mean,
                      args.sums + k * shape.channels,
                      products.value ? args.product_sums + k * shape.channels : nullptr);
    }
  };
  if (args.out && args.product_sums) {
    sum(std::true_type{}, std::true_type{});
  } else if (args.out) {
    sum(std::true_type{}, std::false_type{});
  } else if (args.product_sums) {
    sum(std::false_type{}, std::true_type{});
  } else {
    sum(std::false_type{}, std::false_type{});
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
