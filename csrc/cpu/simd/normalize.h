// What lies between the two linear maps of a transform, and its backward pass. Of each image:
//
//   normalized = (hidden - mean) * inverse_deviation
//   activated  = activation(weight * normalized + bias)
//
// Without a norm, normalized = hidden and activated = activation(hidden). At the end of the file are the conversions of
// small tensors to the accumulation type and back.
#pragma once

#include <cmath>

#include "cpu/simd/cascade.h"
#include "cpu/simd/gate.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// The sum of term(i, n) over the vectors of `count` elements: i is a vector's first element and n how many it has. The
// lanes of a term past n are zero.
template <typename A, typename Term>
inline A sum_vectors(int64_t count, const Term& term) {
  Cascade<Vec<A>> sum;
  for_each_vector<Vec<A>::size()>(0, count, [&](int64_t i, int n, auto) { sum.add(term(i, n)); });
  return lane_sum(sum.total());
}

// The first n lanes of a vector; the others become zero.
template <typename A>
inline Vec<A> first_lanes(const Vec<A>& v, int n) {
  return Vec<A>::set(Vec<A>(A(0)), v, n);
}

// What enters the activation, of the n units from i on: weight * normalized + bias, or normalized without a norm.
template <typename A, typename Args>
inline Vec<A> before_activation(const Args& args, const Vec<A>& normalized, int64_t i, int n) {
  using V = Vec<A>;
  if (!args.weight) return normalized;
  return at::vec::fmadd(normalized, V::loadu(args.weight + i, n), V::loadu(args.bias + i, n));
}

template <typename A>
void activate(const NormalizeArgs<A>& args, int64_t image_begin, int64_t image_end) {
  using V = Vec<A>;
  for (int64_t image = image_begin; image < image_end; ++image) {
    const int64_t at = image * args.width;
    for_each_vector<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V value = before_activation<A>(args, V::loadu(args.hidden + at + i, n), i, n);
      activation_of<A>(args.activation, value).store(args.activated + at + i, n);
    });
  }
}

template <typename A>
void normalize_image(const NormalizeArgs<A>& args, int64_t image) {
  using V = Vec<A>;
  const A width = static_cast<A>(args.width);
  A* hidden = args.hidden + image * args.width;
  const V mean(sum_vectors<A>(args.width, [&](int64_t i, int n) { return V::loadu(hidden + i, n); }) / width);
  const auto centred_square = [&](int64_t i, int n) {
    const V centred = first_lanes<A>(V::loadu(hidden + i, n) - mean, n);
    return centred * centred;
  };
  const A variance = sum_vectors<A>(args.width, centred_square) / width;
  // A variance that overflows gives NaN, as in PyTorch, and not a finite number.
  const A inverse_deviation = A(1) / std::sqrt(variance + static_cast<A>(args.eps)) + (variance - variance);
  args.inverse_deviation[image] = inverse_deviation;
  const V factor(inverse_deviation);
  for_each_vector<V::size()>(
      0, args.width, [&](int64_t i, int n, auto) { ((V::loadu(hidden + i, n) - mean) * factor).store(hidden + i, n); });
}

template <typename A>
void normalize(const NormalizeArgs<A>& args, int64_t image_begin, int64_t image_end) {
  for (int64_t image = image_begin; image < image_end; ++image) {
    if (args.weight) {
      normalize_image(args, image);
    } else {
      args.inverse_deviation[image] = A(1);
    }
  }
  activate(args, image_begin, image_end);
}

template <typename A>
void normalize_backward(const NormalizeBackwardArgs<A>& args) {
  using V = Vec<A>;
  const A width = static_cast<A>(args.width);
  Sums<A> weight_sums(args.width), bias_sums(args.width);
  if (args.weight) {
    weight_sums.start(args.grad_weight);
    bias_sums.start(args.grad_bias);
  }
  for (int64_t image = 0; image < args.images; ++image) {
    const int64_t at = image * args.width;
    const A* normalized = args.normalized + at;
    A* grad = args.grad + at;
    Cascade<V> plain_sum, normalized_sum;
    for_each_vector<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V value = V::loadu(normalized + i, n);
      const V entering = before_activation<A>(args, value, i, n);
      const V before = activation_backward<A>(args.activation, V::loadu(grad + i, n), entering);
      if (!args.weight) {
        before.store(grad + i, n);
        return;
      }
      (V::loadu(args.grad_bias + i, n) + before).store(args.grad_bias + i, n);
      at::vec::fmadd(before, value, V::loadu(args.grad_weight + i, n)).store(args.grad_weight + i, n);
      const V scaled = before * V::loadu(args.weight + i, n);
      plain_sum.add(scaled);
      normalized_sum.add(scaled * value);
      scaled.store(grad + i, n);
    });
    if (!args.weight) continue;
    weight_sums.added();
    bias_sums.added();
    const A plain_mean = lane_sum(plain_sum.total()) / width;
    const A normalized_mean = lane_sum(normalized_sum.total()) / width;
    // Infinite sums make the gradient the difference of two infinities, which is NaN. The formula below would give
    // infinities in some places; PyTorch's arrangement of it gives NaN nearly always.
    const A undefined = (plain_mean - plain_mean) + (normalized_mean - normalized_mean);
    const V factor(args.inverse_deviation[image] + undefined);
    for_each_vector<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V centred = V::loadu(grad + i, n) - V(plain_mean) - V::loadu(normalized + i, n) * V(normalized_mean);
      (centred * factor).store(grad + i, n);
    });
  }
  if (args.weight) {
    weight_sums.finish();
    bias_sums.finish();
  }
}

template <typename T>
void widen(const T* in, acc_t<T>* out, int64_t count) {
  using L = Lanes<T>;
  for_each_vector<L::kWidth>(0, count, [&](int64_t i, int n, auto partial) {
    L::template load<partial.value>(in + i, n).store_wide(out + i, n);
  });
}

template <typename T>
void narrow(const acc_t<T>* in, T* out, int64_t count) {
  using L = Lanes<T>;
  for_each_vector<L::kWidth>(0, count, [&](int64_t i, int n, auto partial) {
    L::template load_wide<partial.value>(in + i, n).template store<partial.value>(out + i, n);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
