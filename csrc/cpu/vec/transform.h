// The transform of a branch, t = w2 relu(layer_norm(w1 context + b1)) + b2, and its backward pass: two linear maps with
// a normalisation between them. The weights are what there is to read; they stay in their own type W and are fetched
// from memory once for all images. Everything else is in the accumulation type.
#pragma once

#include "cpu/vec/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename W>
void linear(const LinearArgs<W>& args, int64_t group_begin, int64_t group_end) {
  using V = Vec<acc_t<W>>;
  static_assert(kLinearRows % V::size() == 0, "how rows are grouped would depend on the cut over threads");
  const V one(acc_t<W>(1));
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t row = group * kLinearRows;
    const int64_t rows = std::min(kLinearRows, args.rows - row);
    for (int64_t image = 0; image < args.images; ++image) {
      acc_t<W>* out = args.out + image * args.rows + row;
      row_dot(args.weight + row * args.columns, args.columns, rows, args.columns, args.in + image * args.in_stride,
              [&](int64_t r, const V& sum, int n) {
                V value = sum + V::loadu(args.bias + row + r, n);
                if (args.sigmoid) value = one / (one + value.neg().exp());
                value.store(out + r, n);
              });
    }
  }
}

// out[r][j] = sum_n grad[n][r] * in[n][j] for kRows rows
template <int kRows, typename W>
inline void outer_sums(const LinearBackwardArgs<W>& args, int64_t row) {
  using L = Lanes<W>;
  using V = typename L::V;
  for_each_run<L::kWidth>(0, args.columns, [&](int64_t j, int count, auto partial) {
    L sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = L::zero();
    for (int64_t image = 0; image < args.images; ++image) {
      const L in = L::template load_wide<partial.value>(args.in + image * args.in_stride + j, count);
      const acc_t<W>* grad = args.grad + image * args.rows + row;
      for (int r = 0; r < kRows; ++r) sums[r].add_product(in, V(grad[r]));
    }
    for (int r = 0; r < kRows; ++r) {
      sums[r].template store<partial.value>(args.grad_weight + (row + r) * args.columns + j, count);
    }
  });
}

template <typename W>
void linear_backward(const LinearBackwardArgs<W>& args, int64_t chunk_begin, int64_t chunk_end) {
  using V = Vec<acc_t<W>>;
  constexpr int kTogether = 4;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t begin = chunk * args.chunk_rows;
    const int64_t end = std::min(begin + args.chunk_rows, args.rows);
    if (args.grad_in) {
      for (int64_t image = 0; image < args.images; ++image) {
        acc_t<W>* out = args.grad_in + (chunk * args.images + image) * args.columns;
        column_accumulate(args.weight + begin * args.columns, args.columns, end - begin, args.columns,
                          args.grad + image * args.rows + begin,
                          [&](int64_t j, const V& sum, int n) { sum.store(out + j, n); });
      }
    }
    if (args.grad_weight) {
      int64_t row = begin;
      for (; row + kTogether <= end; row += kTogether) outer_sums<kTogether>(args, row);
      for (; row < end; ++row) outer_sums<1>(args, row);
    }
  }
}

// sum_i term(i), i the start of a run of n elements; a term's lanes past n are zero.
template <typename A, typename Term>
inline A sum_runs(int64_t count, const Term& term) {
  Vec<A> sum(A(0));
  for_each_run<Vec<A>::size()>(0, count, [&](int64_t i, int n, auto) { sum = sum + term(i, n); });
  return lane_sum(sum);
}

// The first n lanes of a vector; the others become zero.
template <typename A>
inline Vec<A> first_lanes(const Vec<A>& v, int n) {
  return Vec<A>::set(Vec<A>(A(0)), v, n);
}

template <typename A>
void activate(const NormalizeArgs<A>& args, int64_t image_begin, int64_t image_end) {
  using V = Vec<A>;
  const V zero(A(0));
  for (int64_t image = image_begin; image < image_end; ++image) {
    const int64_t at = image * args.width;
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V value =
          at::vec::fmadd(V::loadu(args.hidden + at + i, n), V::loadu(args.weight + i, n), V::loadu(args.bias + i, n));
      V::blendv(value, zero, value <= zero).store(args.activated + at + i, n);  // NaN stays NaN
    });
  }
}

template <typename A>
void normalize(const NormalizeArgs<A>& args, int64_t image_begin, int64_t image_end) {
  using V = Vec<A>;
  const A width = static_cast<A>(args.width);
  for (int64_t image = image_begin; image < image_end; ++image) {
    A* hidden = args.hidden + image * args.width;
    const V mean(sum_runs<A>(args.width, [&](int64_t i, int n) { return V::loadu(hidden + i, n); }) / width);
    const A variance = sum_runs<A>(args.width,
                                   [&](int64_t i, int n) {
                                     const V centred = first_lanes<A>(V::loadu(hidden + i, n) - mean, n);
                                     return centred * centred;
                                   }) /
                       width;
    const A inverse_deviation = A(1) / std::sqrt(variance + static_cast<A>(args.eps));
    args.inverse_deviation[image] = inverse_deviation;
    const V factor(inverse_deviation);
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      ((V::loadu(hidden + i, n) - mean) * factor).store(hidden + i, n);
    });
  }
  activate(args, image_begin, image_end);
}

template <typename A>
void normalize_backward(const NormalizeBackwardArgs<A>& args) {
  using V = Vec<A>;
  const V zero(A(0));
  const V width(static_cast<A>(args.width));
  for (int64_t i = 0; i < args.width; ++i) args.grad_weight[i] = args.grad_bias[i] = 0;
  for (int64_t image = 0; image < args.images; ++image) {
    const int64_t at = image * args.width;
    const A* normalized = args.normalized + at;
    A* grad = args.grad + at;
    V plain_sum(A(0));
    V normalized_sum(A(0));
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V active = V::loadu(args.activated + at + i, n);
      const V before = V::blendv(V::loadu(grad + i, n), zero, active <= zero);
      const V value = V::loadu(normalized + i, n);
      (V::loadu(args.grad_bias + i, n) + before).store(args.grad_bias + i, n);
      at::vec::fmadd(before, value, V::loadu(args.grad_weight + i, n)).store(args.grad_weight + i, n);
      const V scaled = before * V::loadu(args.weight + i, n);
      plain_sum = plain_sum + scaled;
      normalized_sum = at::vec::fmadd(scaled, value, normalized_sum);
      scaled.store(grad + i, n);
    });
    const V plain_mean = V(lane_sum(plain_sum)) / width;
    const V normalized_mean = V(lane_sum(normalized_sum)) / width;
    const V factor(args.inverse_deviation[image]);
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V centred = V::loadu(grad + i, n) - plain_mean - V::loadu(normalized + i, n) * normalized_mean;
      (centred * factor).store(grad + i, n);
    });
  }
}

template <typename A>
void sigmoid_backward(const A* scale, A* grad, int64_t count) {
  using V = Vec<A>;
  const V one(A(1));
  for_each_run<V::size()>(0, count, [&](int64_t i, int n, auto) {
    const V s = V::loadu(scale + i, n);
    (V::loadu(grad + i, n) * s * (one - s)).store(grad + i, n);
  });
}

template <typename T>
void widen(const T* in, acc_t<T>* out, int64_t count) {
  using L = Lanes<T>;
  for_each_run<L::kWidth>(0, count, [&](int64_t i, int n, auto partial) {
    const L lanes = L::template load<partial.value>(in + i, n);
    for (int k = 0; k < L::kVecs; ++k) {
      if (L::part(n, k) > 0) lanes.v[k].store(out + i + k * L::kVecWidth, L::part(n, k));
    }
  });
}

template <typename T>
void narrow(const acc_t<T>* in, T* out, int64_t count) {
  using L = Lanes<T>;
  for_each_run<L::kWidth>(0, count, [&](int64_t i, int n, auto partial) {
    L::template load_wide<partial.value>(in + i, n).template store<partial.value>(out + i, n);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
