// The bottleneck of the context block, for one or two branches that read the same context, in one launch:
//
//   h = W1 . context + b1;  normalized = (h - mean h) / sqrt(var h + eps);  y = act(norm_weight * normalized +
//   norm_bias) out = gate(W2 . y + b2)
//
// Without a norm (Squeeze-and-Excitation), normalized is h and y = act(h).
//
// context [N, C] -> out [N, C] a branch; W1 [P, C], W2 [C, P]. All sums in the accumulation type.
//
// Decomposition: two phases (phases.h). In the first, warps take rows of W1; in the second, every block computes the
// norm for itself (P values an image) and its warps take rows of W2. A row is fetched once for kManyImages images.
//
// Moves: W1 and W2 once from memory; context and h once a block, from the second-level cache.
#pragma once

#include "transform.h"

namespace gc {

// Sums each value over the warp. Lane l gets the sum of value[scattered_index<kCount>(l)].
template <int kCount, int kMask = 1, typename A, int kSize>
GC_DEVICE A scatter_sums(A (&value)[kSize]) {
  if constexpr (kCount > 1) {  // lanes that differ in kMask share the values out, half of them each
    constexpr int kHalf = kCount / 2;
    const bool upper = (port::thread_index() & kMask) != 0;
    GC_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const A given = upper ? value[i] : value[kHalf + i];
      const A kept = upper ? value[kHalf + i] : value[i];
      value[i] = kept + port::shuffle_xor(given, kMask);
    }
    return scatter_sums<kHalf, kMask * 2>(value);
  } else {
    GC_UNROLL
    for (int mask = kMask; mask < kWarp; mask *= 2) value[0] += port::shuffle_xor(value[0], mask);
    return value[0];
  }
}

template <int kCount>
GC_DEVICE int scattered_index(int lane) {
  int index = 0;
  GC_UNROLL
  for (int half = kCount / 2, mask = 1; half > 0; half /= 2, mask *= 2) index += (lane & mask) != 0 ? half : 0;
  return index;
}

// Calls write(n, row . vectors[n]) for the `images` vectors, each in one lane of the warp that took the row.
template <int kWidth, int kImages, typename W, typename A, typename Write>
GC_DEVICE void row_dots(const W* row, int count, const A* vectors, long long stride, int images, const Write& write) {
  [[maybe_unused]] constexpr int kUnroll = kImages > kFewImages ? 2 : 8;  // loads in flight, as far as registers go
  const int lane = port::thread_index() % kWarp;
  for (int n0 = 0; n0 < images; n0 += kImages) {
    A sums[kImages];
    GC_UNROLL
    for (int n = 0; n < kImages; ++n) sums[n] = 0;
    GC_UNROLL_BY(kUnroll)
    for (int i = lane * kWidth; i < count; i += kWarp * kWidth) {
      const auto weight = port::load_global(reinterpret_cast<const Vector<W, kWidth>*>(row + i));
      GC_UNROLL
      for (int n = 0; n < kImages; ++n) {
        if (n0 + n >= images) continue;
        const auto v = *reinterpret_cast<const Vector<A, kWidth>*>(vectors + (n0 + n) * stride + i);
        GC_UNROLL
        for (int k = 0; k < kWidth; ++k) sums[n] += to_acc(weight.value[k]) * v.value[k];
      }
    }
    const A sum = scatter_sums<kImages>(sums);
    const int n = n0 + scattered_index<kImages>(lane);
    if (lane < kImages && n < images) write(n, sum);
  }
}

template <int kWidth, typename W, typename A, typename Write>
GC_DEVICE void row_dots(const W* row, int count, const A* vectors, long long stride, int images, const Write& write) {
  if (images <= kFewImages) {
    row_dots<kWidth, kFewImages>(row, count, vectors, stride, images, write);
  } else {
    row_dots<kWidth, kManyImages>(row, count, vectors, stride, images, write);
  }
}

// The same for row `r` of a matrix [rows, count].
template <typename T, int kWidth, typename Write>
GC_DEVICE void matrix_row_dots(const Companion& matrix, int r, int count, const Acc<T>* vectors, long long stride,
                               int images, const Write& write) {
  using A = Acc<T>;
  const long long first = static_cast<long long>(r) * count;
  if constexpr (sizeof(T) < sizeof(A)) {
    if (matrix.wide) {
      row_dots<kWidth>(static_cast<const A*>(matrix.data) + first, count, vectors, stride, images, write);
      return;
    }
  }
  row_dots<kWidth>(static_cast<const T*>(matrix.data) + first, count, vectors, stride, images, write);
}

// The norm and its activation for images n0 .. n0 + images of a branch, a warp an image: y [images, P] in shared
// memory.
template <typename T>
GC_DEVICE void normalize(const TransformForwardArgs& args, const TransformBranch& branch, const Phase& phase, int n0,
                         int images, Acc<T>* y) {
  using A = Acc<T>;
  const int lane = port::thread_index() % kWarp;
  for (int n = port::thread_index() / kWarp; n < images; n += kTransformWarps) {
    const long long row0 = static_cast<long long>(n0 + n) * branch.hidden;
    const A* const h = static_cast<const A*>(branch.products) + row0;
    A mean = 0;
    A inverse_deviation = 1;
    if (branch.norm_weight.data != nullptr) {
      for (int p = lane; p < branch.hidden; p += kWarp) mean += h[p];
      mean = warp_sum(mean) / static_cast<A>(branch.hidden);
      A variance = 0;
      for (int p = lane; p < branch.hidden; p += kWarp) variance += (h[p] - mean) * (h[p] - mean);
      variance = warp_sum(variance) / static_cast<A>(branch.hidden);
      // A variance that overflows gives NaN, as in PyTorch, and not a finite number.
      inverse_deviation = A(1) / port::sqrt(variance + static_cast<A>(args.eps)) + (variance - variance);
    }
    const bool writer = (n0 + n) % phase.blocks() == phase.block();  // every block has them; one writes them down
    for (int p = lane; p < branch.hidden; p += kWarp) {
      const A normalized = (h[p] - mean) * inverse_deviation;
      y[n * branch.hidden + p] = activate(args.activation, before_activation<T>(branch, normalized, p));
      if (writer) static_cast<A*>(branch.normalized)[row0 + p] = normalized;
    }
    if (writer && lane == 0) static_cast<A*>(branch.inverse_deviation)[n0 + n] = inverse_deviation;
  }
}

// kWidth: elements moved by one load of a weight.
template <typename T, int kWidth>
GC_KERNEL(kTransformThreads, 2)
transform_forward(const TransformForwardArgs args) {
  using A = Acc<T>;
  port::SharedArena arena;
  int* const ticket = arena.take<int>(1);
  const int hidden_max = args.branches > 1 && args.branch[1].hidden > args.branch[0].hidden ? args.branch[1].hidden
                                                                                            : args.branch[0].hidden;
  A* const y = arena.take<A>(args.images_at_once * hidden_max);
  const Phase phase(args.grid, args.counters, ticket);
  phase.await_previous();

  const int warps = phase.blocks() * kTransformWarps;
  const int warp = phase.block() * kTransformWarps + port::thread_index() / kWarp;
  GC_UNROLL_BY(1)
  for (int b = 0; b < args.branches; ++b) {
    const TransformBranch branch = b == 0 ? args.branch[0] : args.branch[1];
    const int first =
        b == 0 ? warp : warps - 1 - warp;  // who has a row less in one branch may have one more in the other
    if (phase.number() == 0) {
      A* const products = static_cast<A*>(branch.products);
      for (int p = first; p < branch.hidden; p += warps) {
        const A bias = read<T>(branch.b1, p);
        matrix_row_dots<T, kWidth>(
            branch.w1, p, args.channels, static_cast<const A*>(args.context), args.context_stride, args.images,
            [&](int n, A sum) { products[static_cast<long long>(n) * branch.hidden + p] = sum + bias; });
      }
      continue;
    }
    for (int n0 = 0; n0 < args.images; n0 += args.images_at_once) {
      const int images = args.images - n0 < args.images_at_once ? args.images - n0 : args.images_at_once;
      if (b + n0 > 0) port::sync_block<kSyncHiddenDone>();
      normalize<T>(args, branch, phase, n0, images, y);
      port::sync_block<kSyncHiddenReady>();
      A* const out = static_cast<A*>(branch.out) + static_cast<long long>(n0) * args.channels;
      for (int c = first; c < args.channels; c += warps) {
        const A bias = read<T>(branch.b2, c);
        matrix_row_dots<T, kWidth>(branch.w2, c, branch.hidden, y, branch.hidden, images, [&](int n, A sum) {
          out[static_cast<long long>(n) * args.channels + c] = pass_gate(branch.gate, sum + bias);
        });
      }
    }
  }
  phase.finish();
}

}  // namespace gc
