// The transform of a branch, t = gate(w2 act(layer_norm(w1 context + b1)) + b2), and its backward pass: two linear maps
// with a normalisation (or none) and an activation between them. The weights are what there is to read; they stay in
// their own type W and are fetched from memory once for all images. Everything else is in the accumulation type.
#pragma once

#include "cpu/simd/cascade.h"
#include "cpu/simd/reduce.h"
#include "cpu/simd/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// Images and runs of columns that share a weight while it is in a register: 16 accumulators with AVX-512, else 8.
inline constexpr int kSharingImages = sizeof(Vec<float>) == 64 ? 4 : 2;
inline constexpr int kSharingVectors = 4;

// The functions and their derivatives are PyTorch's, with its results for NaN and at the edges.

template <typename A>
inline Vec<A> sigmoid(const Vec<A>& v) {
  const Vec<A> one(A(1));
  return one / (one + v.neg().exp());
}

// relu6(v + 3) / 6
template <typename A>
inline Vec<A> hardsigmoid(const Vec<A>& v) {
  using V = Vec<A>;
  const V six(A(6));
  return at::vec::minimum(at::vec::maximum(v + V(A(3)), V(A(0))), six) / six;
}

template <typename A>
inline Vec<A> pass_gate(Gate gate, const Vec<A>& v) {
  if (gate == Gate::kNone) return v;
  return gate == Gate::kSigmoid ? sigmoid<A>(v) : hardsigmoid<A>(v);
}

template <typename A>
inline Vec<A> activation_of(Activation activation, const Vec<A>& v) {
  using V = Vec<A>;
  if (activation == Activation::kReLU) return V::blendv(v, V(A(0)), v <= V(A(0)));  // NaN stays NaN
  if (activation == Activation::kSiLU) return v / (V(A(1)) + v.neg().exp());
  return v * hardsigmoid<A>(v);
}

// The gradient before the activation from that behind it.
template <typename A>
inline Vec<A> activation_backward(Activation activation, const Vec<A>& grad, const Vec<A>& v) {
  using V = Vec<A>;
  const V zero(A(0)), one(A(1)), three(A(3));
  if (activation == Activation::kReLU) return V::blendv(grad, zero, v <= zero);
  if (activation == Activation::kSiLU) {
    const V s = sigmoid<A>(v);
    return grad * s * (one + v * (one - s));
  }
  const V between = V::blendv(grad, grad * (v / three + V(A(0.5))), v < three);
  return V::blendv(between, zero, v <= three.neg());
}

// A segment of the columns at a time, copied for a block of images to where it shares the first-level cache with a few
// rows of it: as they lie, rows and images a power of two apart would displace each other there.
template <typename W>
void linear(const LinearArgs<W>& args, int64_t group_begin, int64_t group_end) {
  using A = acc_t<W>;
  using V = typename Lanes<W>::V;
  constexpr int kImages = std::min(4, kRowsTogether<W>);
  constexpr int64_t kBlockImages = 16;
  constexpr int64_t kSegment = kChain * V::size();
  static_assert(kLinearRows % V::size() == 0 && kLinearRows % kRowsTogether<W> == 0);
  alignas(64) A sums[kBlockImages * kLinearRows];
  alignas(64) A in[kBlockImages * kSegment];
  for (int64_t first = 0; first < args.images; first += kBlockImages) {
    const int64_t block = std::min(kBlockImages, args.images - first);
    for (int64_t j = 0; j < args.columns; j += kSegment) {
      const int64_t width = std::min(kSegment, args.columns - j);
      for (int64_t image = 0; image < block; ++image) {
        const A* from = args.in + (first + image) * args.in_stride + j;
        for_each_run<V::size()>(
            0, width, [&](int64_t i, int n, auto) { V::loadu(from + i, n).store(in + image * kSegment + i, n); });
      }
      for (int64_t group = group_begin; group < group_end; ++group) {
        const int64_t row = group * kLinearRows;
        const int64_t rows = std::min(kLinearRows, args.rows - row);
        const W* weight = args.weight + row * args.columns + j;
        for_each_group<kImages>(0, block, [&](int64_t image, auto images) {
          for_each_group<kRowsTogether<W> / images>(0, rows, [&](int64_t r, auto together) {
            A lanes[V::size()];
            dot_rows<together, images>(weight + r * args.columns, args.columns, width, in + image * kSegment, kSegment)
                .store(lanes);
            for (int k = 0; k < images; ++k) {
              std::copy_n(lanes + k * together, together.value, sums + (image + k) * kLinearRows + r);
            }
          });
        });
        const bool last = j + width == args.columns;
        for (int64_t image = 0; image < block; ++image) {
          A* out = args.out + (first + image) * args.rows + row;
          for_each_run<V::size()>(0, rows, [&](int64_t i, int n, auto) {
            const V before = V::loadu(j == 0 ? args.bias + row + i : out + i, n);
            const V value = before + V::loadu(sums + image * kLinearRows + i, n);
            (last ? pass_gate<A>(args.gate, value) : value).store(out + i, n);
          });
        }
      }
    }
  }
}

// Sums of kRows rows by kRuns runs of columns.
template <typename W, int kRows, int kRuns>
struct SumBlock {
  Lanes<W> sums[kRows][kRuns];

  explicit SumBlock(int value) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GC_UNROLL
      for (int b = 0; b < kRuns; ++b) sums[r][b] = Lanes<W>::all(acc_t<W>(value));
    }
  }
  SumBlock& operator+=(const SumBlock& other) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GC_UNROLL
      for (int b = 0; b < kRuns; ++b) sums[r][b].add(other.sums[r][b]);
    }
    return *this;
  }
};

// The columns [j, j + runs) of kRows rows of sum_n grad[n][row] * in[n][j], for the images [begin, end).
template <int kRows, int kRuns, bool kPartial, typename W>
GC_INLINE SumBlock<W, kRows, kRuns> outer_products(const LinearBackwardArgs<W>& args, int64_t begin, int64_t end,
                                                   int64_t row, int64_t j, int last) {
  using L = Lanes<W>;
  using V = typename L::V;
  SumBlock<W, kRows, kRuns> block(0);
  for (int64_t image = begin; image < end; ++image) {
    const acc_t<W>* from = args.in + image * args.in_stride + j;
    const acc_t<W>* grad = args.grad + image * args.rows + row;
    L in[kRuns];
    GC_UNROLL
    for (int b = 0; b < kRuns; ++b) in[b] = L::template load_wide<kPartial>(from + b * L::kWidth, last);
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V factor(grad[r]);
      GC_UNROLL
      for (int b = 0; b < kRuns; ++b) block.sums[r][b].add_product(in[b], factor);
    }
  }
  return block;
}

// The columns [j, j + runs) of kRows rows of grad_weight.
template <int kRows, int kRuns, bool kPartial, typename W>
inline void outer_sums(const LinearBackwardArgs<W>& args, int64_t row, int64_t j, int last) {
  using L = Lanes<W>;
  const auto of_images = [&](int64_t begin) {
    const int64_t end = std::min(begin + kChain, args.images);
    return outer_products<kRows, kRuns, kPartial>(args, begin, end, row, j, last);
  };
  const auto store = [&](const SumBlock<W, kRows, kRuns>& block) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      W* out = args.grad_weight + (row + r) * args.columns + j;
      GC_UNROLL
      for (int b = 0; b < kRuns; ++b) block.sums[r][b].template store<kPartial>(out + b * L::kWidth, last);
    }
  };
  if (args.images <= kChain) {  // their sums need not leave the registers
    store(of_images(0));
    return;
  }
  Cascade<SumBlock<W, kRows, kRuns>> blocks;
  for (int64_t image = 0; image < args.images; image += kChain) blocks.add(of_images(image));
  store(blocks.total());
}

// The columns [j, j + runs) of grad_in for kImages images, (+)= sum_row weight[row][j] * grad[n][row]
template <int kImages, int kRuns, bool kPartial, typename W>
inline void accumulate_rows(const LinearBackwardArgs<W>& args, int64_t row_begin, int64_t row_end, int64_t image,
                            int64_t j, int last, acc_t<W>* grad_in, bool add) {
  using L = Lanes<W>;
  using V = typename L::V;
  const acc_t<W>* grad = args.grad + image * args.rows;
  L sums[kImages][kRuns];
  GC_UNROLL
  for (int k = 0; k < kImages; ++k) {
    GC_UNROLL
    for (int b = 0; b < kRuns; ++b) sums[k][b] = L::zero();
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    const W* from = args.weight + row * args.columns + j;
    L weight[kRuns];
    GC_UNROLL
    for (int b = 0; b < kRuns; ++b) weight[b] = L::template load<kPartial>(from + b * L::kWidth, last);
    GC_UNROLL
    for (int k = 0; k < kImages; ++k) {
      const V factor(grad[k * args.rows + row]);
      GC_UNROLL
      for (int b = 0; b < kRuns; ++b) sums[k][b].add_product(weight[b], factor);
    }
  }
  GC_UNROLL
  for (int k = 0; k < kImages; ++k) {
    acc_t<W>* out = grad_in + (image + k) * args.columns + j;
    GC_UNROLL
    for (int b = 0; b < kRuns; ++b) {
      if (add) {
        sums[k][b].add_to(out + b * L::kWidth, last);
      } else {
        sums[k][b].store_wide(out + b * L::kWidth, last);
      }
    }
  }
}

// Columns are taken in blocks, so that what all rows or images share of one stays in the first-level cache.
template <typename W>
void linear_backward(const LinearBackwardArgs<W>& args, int64_t piece_begin, int64_t piece_end) {
  using L = Lanes<W>;
  for (int64_t piece = piece_begin; piece < piece_end; ++piece) {
    const int64_t chunk = piece / args.pieces.blocks;
    const int64_t begin = chunk * args.pieces.chunk_rows;
    const int64_t end = std::min(begin + args.pieces.chunk_rows, args.rows);
    const int64_t first = piece % args.pieces.blocks * kPieceColumns;
    const int64_t width = std::min(kPieceColumns, args.columns - first);
    if (args.grad_bias && first == 0) {
      reduce<acc_t<W>>({args.grad, args.grad_bias, 1, args.images, args.rows}, begin, end);
    }
    if (args.grad_in) {
      acc_t<W>* out = args.grad_in + chunk * args.images * args.columns;
      for (int64_t row = begin; row < end; row += kChain) {
        for_each_block<kSharingVectors / L::kVecs, L::kWidth>(width, [&](int64_t j, auto runs, int last, auto partial) {
          for_each_group<kSharingImages>(0, args.images, [&](int64_t image, auto images) {
            accumulate_rows<images, runs, partial>(args, row, std::min(row + kChain, end), image, first + j, last, out,
                                                   row > begin);
          });
        });
      }
    }
    if (args.grad_weight) {
      for_each_group<4>(begin, end, [&](int64_t row, auto rows) {
        for_each_block<kSharingImages / L::kVecs, L::kWidth>(width, [&](int64_t j, auto runs, int last, auto partial) {
          outer_sums<rows, runs, partial>(args, row, first + j, last);
        });
      });
    }
  }
}

// sum_i term(i), i the start of a run of n elements; a term's lanes past n are zero.
template <typename A, typename Term>
inline A sum_runs(int64_t count, const Term& term) {
  Cascade<Vec<A>> sum;
  for_each_run<Vec<A>::size()>(0, count, [&](int64_t i, int n, auto) { sum.add(term(i, n)); });
  return lane_sum(sum.total());
}

// The first n lanes of a vector; the others become zero.
template <typename A>
inline Vec<A> first_lanes(const Vec<A>& v, int n) {
  return Vec<A>::set(Vec<A>(A(0)), v, n);
}

// What goes into the activation at `i` of an image: the norm's weight and bias on what it left, or that itself.
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
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
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
  const V mean(sum_runs<A>(args.width, [&](int64_t i, int n) { return V::loadu(hidden + i, n); }) / width);
  const A variance = sum_runs<A>(args.width,
                                 [&](int64_t i, int n) {
                                   const V centred = first_lanes<A>(V::loadu(hidden + i, n) - mean, n);
                                   return centred * centred;
                                 }) /
                     width;
  // A variance that overflows gives NaN, as in PyTorch, and not a finite number.
  const A inverse_deviation = A(1) / std::sqrt(variance + static_cast<A>(args.eps)) + (variance - variance);
  args.inverse_deviation[image] = inverse_deviation;
  const V factor(inverse_deviation);
  for_each_run<V::size()>(
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
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
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
    // Of infinite sums the formula makes infinities here and NaN there, PyTorch's arrangement of it nearly always NaN,
    // which is what the gradient is: the difference of two infinities.
    const A undefined = (plain_mean - plain_mean) + (normalized_mean - normalized_mean);
    const V factor(args.inverse_deviation[image] + undefined);
    for_each_run<V::size()>(0, args.width, [&](int64_t i, int n, auto) {
      const V centred = V::loadu(grad + i, n) - V(plain_mean) - V::loadu(normalized + i, n) * V(normalized_mean);
      (centred * factor).store(grad + i, n);
    });
  }
  if (args.weight) {
    weight_sums.finish();
    bias_sums.finish();
  }
}

template <typename A>
void gate_backward(Gate gate, const A* scale, A* grad, int64_t count) {
  using V = Vec<A>;
  const V zero(A(0)), one(A(1)), six(A(6));
  for_each_run<V::size()>(0, count, [&](int64_t i, int n, auto) {
    const V s = V::loadu(scale + i, n);
    const V g = V::loadu(grad + i, n);
    if (gate == Gate::kSigmoid) {
      (g * s * (one - s)).store(grad + i, n);
    } else {  // a NaN passes nothing, as in PyTorch
      V::blendv(V::blendv(zero, g / six, s > zero), zero, s >= one).store(grad + i, n);
    }
  });
}

template <typename T>
void widen(const T* in, acc_t<T>* out, int64_t count) {
  using L = Lanes<T>;
  for_each_run<L::kWidth>(0, count, [&](int64_t i, int n, auto partial) {
    L::template load<partial.value>(in + i, n).store_wide(out + i, n);
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
