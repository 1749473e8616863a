// The linear maps of a branch's transform, t = gate(w2 activation(norm(w1 context + b1)) + b2):
//
//   out[n] = gate(weight in[n] + bias)
//
// And their backward pass:
//
//   grad_weight[row, column] = sum_n grad[n, row] * in[n, column]
//   grad_bias[row]           = sum_n grad[n, row]
//   grad_in[n, column]       = sum_row weight[row, column] * grad[n, row]
//
// The weight is what there is to read. It stays in its own type W and is fetched from memory once for all images;
// everything else is in the accumulation type.
#pragma once

#include "cpu/simd/cascade.h"
#include "cpu/simd/gate.h"
#include "cpu/simd/reduce.h"
#include "cpu/simd/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// So many images, and vectors of columns, share a weight while it is in a register: that takes 16 accumulators with
// AVX-512 and 8 without.
inline constexpr int kSharingImages = sizeof(Vec<float>) == 64 ? 4 : 2;
inline constexpr int kSharingVectors = 4;

// The forward pass takes so many images and, of them and of a few rows of the weight, so many columns at a time. The
// images' columns are copied to where they share the first-level cache with the rows': in memory, rows and images are
// often a power of two apart and would displace each other there.
inline constexpr int64_t kLinearImages = 16;
template <typename W>
inline constexpr int64_t kLinearColumns = kChain * Lanes<W>::V::size();

// sums[image * kLinearRows + row] = weight[row] . in[image], of `rows` rows and `images` images
template <typename W>
inline void dot_images(const W* weight, int64_t stride, int64_t rows, const acc_t<W>* in, int64_t images, int64_t width,
                       acc_t<W>* sums) {
  constexpr int kImages = std::min(4, kRowsTogether<W>);
  for_each_group<kImages>(0, images, [&](int64_t image, auto group) {
    for_each_group<kRowsTogether<W> / group>(0, rows, [&](int64_t row, auto together) {
      acc_t<W> lanes[Lanes<W>::V::size()];
      dot_rows<together, group>(weight + row * stride, stride, width, in + image * kLinearColumns<W>, kLinearColumns<W>)
          .store(lanes);
      for (int k = 0; k < group; ++k) {
        std::copy_n(lanes + k * together, together.value, sums + (image + k) * kLinearRows + row);
      }
    });
  });
}

template <typename W>
void linear(const LinearArgs<W>& args, int64_t group_begin, int64_t group_end) {
  using A = acc_t<W>;
  using V = typename Lanes<W>::V;
  constexpr int64_t kColumns = kLinearColumns<W>;
  static_assert(kLinearRows % V::size() == 0 && kLinearRows % kRowsTogether<W> == 0);
  alignas(64) A sums[kLinearImages * kLinearRows];
  alignas(64) A in[kLinearImages * kColumns];
  for (int64_t first = 0; first < args.images; first += kLinearImages) {
    const int64_t images = std::min(kLinearImages, args.images - first);
    for (int64_t j = 0; j < args.columns; j += kColumns) {
      const int64_t width = std::min(kColumns, args.columns - j);
      const bool last = j + width == args.columns;
      for (int64_t image = 0; image < images; ++image) {
        const A* from = args.in + (first + image) * args.in_stride + j;
        for_each_vector<V::size()>(
            0, width, [&](int64_t i, int n, auto) { V::loadu(from + i, n).store(in + image * kColumns + i, n); });
      }
      for (int64_t group = group_begin; group < group_end; ++group) {
        const int64_t row = group * kLinearRows;
        const int64_t rows = std::min(kLinearRows, args.rows - row);
        dot_images(args.weight + row * args.columns + j, args.columns, rows, in, images, width, sums);
        for (int64_t image = 0; image < images; ++image) {
          A* out = args.out + (first + image) * args.rows + row;
          for_each_vector<V::size()>(0, rows, [&](int64_t i, int n, auto) {
            const V before = V::loadu(j == 0 ? args.bias + row + i : out + i, n);
            const V value = before + V::loadu(sums + image * kLinearRows + i, n);
            (last ? pass_gate<A>(args.gate, value) : value).store(out + i, n);
          });
        }
      }
    }
  }
}

// The sums of kRows rows by kVectors vectors of columns of a weight.
template <typename W, int kRows, int kVectors>
struct OuterSums {
  Lanes<W> sums[kRows][kVectors];

  explicit OuterSums(int value) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GC_UNROLL
      for (int b = 0; b < kVectors; ++b) sums[r][b] = Lanes<W>::all(acc_t<W>(value));
    }
  }
  OuterSums& operator+=(const OuterSums& other) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GC_UNROLL
      for (int b = 0; b < kVectors; ++b) sums[r][b].add(other.sums[r][b]);
    }
    return *this;
  }
};

// sum_n grad[n, row] * in[n, column] over the images [begin, end), for kRows rows from `row` on and kVectors vectors of
// columns from j on, the last of which has `last` columns.
template <int kRows, int kVectors, bool kPartial, typename W>
GC_INLINE OuterSums<W, kRows, kVectors> outer_products(const LinearBackwardArgs<W>& args, int64_t begin, int64_t end,
                                                       int64_t row, int64_t j, int last) {
  using L = Lanes<W>;
  using V = typename L::V;
  OuterSums<W, kRows, kVectors> outer(0);
  for (int64_t image = begin; image < end; ++image) {
    const acc_t<W>* from = args.in + image * args.in_stride + j;
    const acc_t<W>* grad = args.grad + image * args.rows + row;
    L in[kVectors];
    GC_UNROLL
    for (int b = 0; b < kVectors; ++b) in[b] = L::template load_wide<kPartial>(from + b * L::kWidth, last);
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V factor(grad[r]);
      GC_UNROLL
      for (int b = 0; b < kVectors; ++b) outer.sums[r][b].add_product(in[b], factor);
    }
  }
  return outer;
}

// The same over all images, as grad_weight.
template <int kRows, int kVectors, bool kPartial, typename W>
inline void write_grad_weight(const LinearBackwardArgs<W>& args, int64_t row, int64_t j, int last) {
  using L = Lanes<W>;
  const auto of_images = [&](int64_t begin) {
    const int64_t end = std::min(begin + kChain, args.images);
    return outer_products<kRows, kVectors, kPartial>(args, begin, end, row, j, last);
  };
  const auto store = [&](const OuterSums<W, kRows, kVectors>& outer) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      W* out = args.grad_weight + (row + r) * args.columns + j;
      GC_UNROLL
      for (int b = 0; b < kVectors; ++b) outer.sums[r][b].template store<kPartial>(out + b * L::kWidth, last);
    }
  };
  if (args.images <= kChain) {  // the sums need not leave the registers
    store(of_images(0));
    return;
  }
  Cascade<OuterSums<W, kRows, kVectors>> sum;
  for (int64_t image = 0; image < args.images; image += kChain) sum.add(of_images(image));
  store(sum.total());
}

// sum_row weight[row, column] * grad[n, row] over the rows [row_begin, row_end), for kImages images from `image` on and
// kVectors vectors of columns from j on, the last of which has `last` columns. Written to grad_in, or added to it.
template <int kImages, int kVectors, bool kPartial, typename W>
inline void write_grad_in(const LinearBackwardArgs<W>& args, int64_t row_begin, int64_t row_end, int64_t image,
                          int64_t j, int last, acc_t<W>* grad_in, bool add) {
  using L = Lanes<W>;
  using V = typename L::V;
  const acc_t<W>* grad = args.grad + image * args.rows;
  L sums[kImages][kVectors];
  GC_UNROLL
  for (int k = 0; k < kImages; ++k) {
    GC_UNROLL
    for (int b = 0; b < kVectors; ++b) sums[k][b] = L::zero();
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    const W* from = args.weight + row * args.columns + j;
    L weight[kVectors];
    GC_UNROLL
    for (int b = 0; b < kVectors; ++b) weight[b] = L::template load<kPartial>(from + b * L::kWidth, last);
    GC_UNROLL
    for (int k = 0; k < kImages; ++k) {
      const V factor(grad[k * args.rows + row]);
      GC_UNROLL
      for (int b = 0; b < kVectors; ++b) sums[k][b].add_product(weight[b], factor);
    }
  }
  GC_UNROLL
  for (int k = 0; k < kImages; ++k) {
    acc_t<W>* out = grad_in + (image + k) * args.columns + j;
    GC_UNROLL
    for (int b = 0; b < kVectors; ++b) {
      if (add) {
        sums[k][b].add_to(out + b * L::kWidth, last);
      } else {
        sums[k][b].store_wide(out + b * L::kWidth, last);
      }
    }
  }
}

// A piece has few columns, so that what all rows or images share of them stays in the first-level cache.
template <typename W>
void linear_backward(const LinearBackwardArgs<W>& args, int64_t piece_begin, int64_t piece_end) {
  using L = Lanes<W>;
  for (int64_t piece = piece_begin; piece < piece_end; ++piece) {
    const int64_t chunk = piece / args.pieces.per_chunk;
    const int64_t begin = chunk * args.pieces.chunk_rows;
    const int64_t end = std::min(begin + args.pieces.chunk_rows, args.rows);
    const int64_t first = piece % args.pieces.per_chunk * kPieceColumns;
    const int64_t width = std::min(kPieceColumns, args.columns - first);
    if (args.grad_bias && first == 0) {
      ReduceArgs<acc_t<W>> bias{};
      bias.in = args.grad;
      bias.out = args.grad_bias;
      bias.groups = 1;
      bias.members = args.images;
      bias.width = args.rows;
      reduce(bias, begin, end);
    }
    if (args.grad_in) {
      acc_t<W>* out = args.grad_in + chunk * args.images * args.columns;
      for (int64_t row = begin; row < end; row += kChain) {
        const int64_t row_end = std::min(row + kChain, end);
        for_each_vectors<kSharingVectors / L::kVecs, L::kWidth>(
            width, [&](int64_t j, auto vectors, int last, auto partial) {
              for_each_group<kSharingImages>(0, args.images, [&](int64_t image, auto images) {
                write_grad_in<images, vectors, partial>(args, row, row_end, image, first + j, last, out, row > begin);
              });
            });
      }
    }
    if (args.grad_weight) {
      for_each_group<4>(begin, end, [&](int64_t row, auto rows) {
        for_each_vectors<kSharingImages / L::kVecs, L::kWidth>(
            width, [&](int64_t j, auto vectors, int last, auto partial) {
              write_grad_weight<rows, vectors, partial>(args, row, first + j, last);
            });
      });
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
