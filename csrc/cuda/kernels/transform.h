// What the forward and the backward kernel of the transform share. The transform is the pair of small matrix products
// between pooling and broadcast.
#pragma once

#include "args.h"
#include "geometry.h"

namespace gc {

inline constexpr int kTransformThreads = 256;
inline constexpr int kTransformWarps = kTransformThreads / kWarp;

// Sums of many terms are made in two levels: chains of this many terms are added up one after the other, and so are the
// chains' sums. The length is about the root of `count`, so that rounding errors hardly grow with the number of terms.
// It is a multiple of `least`, and like `least` a power of two.
GC_BOTH int chain_length(int count, int least) {
  long long length = least;
  while (length * length < count) length *= 2;
  return static_cast<int>(length);
}

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "phases.h"
#include "tile.h"

namespace gc {

// The activations, the gates and their derivatives are PyTorch's, with its results for NaN and at the edges.

template <typename A>
GC_DEVICE A sigmoid(A v) {
  return A(1) / (A(1) + port::exp2(-v * A(1.4426950408889634074)));
}

// relu6(v + 3)
template <typename A>
GC_DEVICE A six_at_most(A v) {
  v += A(3);
  v = v < A(0) ? A(0) : v;
  return v > A(6) ? A(6) : v;
}

template <typename A>
GC_DEVICE A activate(Activation activation, A v) {
  if (activation == Activation::kReLU) return v < A(0) ? A(0) : v;
  if (activation == Activation::kSiLU) return v / (A(1) + port::exp2(-v * A(1.4426950408889634074)));
  return v * six_at_most(v) / A(6);
}

// The gradient of the activation's input v from that of its output.
template <typename A>
GC_DEVICE A activate_backward(Activation activation, A grad, A v) {
  if (activation == Activation::kReLU) return v <= A(0) ? A(0) : grad;
  if (activation == Activation::kSiLU) {
    const A s = sigmoid(v);
    return grad * s * (A(1) + v * (A(1) - s));
  }
  if (v <= A(-3)) return A(0);
  return v < A(3) ? grad * (v / A(3) + A(0.5)) : grad;
}

template <typename A>
GC_DEVICE A pass_gate(Gate gate, A v) {
  if (gate == Gate::kNone) return v;
  return gate == Gate::kSigmoid ? sigmoid(v) : six_at_most(v) / A(6);
}

// The gradient of the gate's input from that of its output and from the output itself.
template <typename A>
GC_DEVICE A gate_backward(Gate gate, A grad, A out) {
  if (gate == Gate::kSigmoid) return grad * out * (A(1) - out);
  return out > A(0) && out < A(1) ? grad / A(6) : A(0);
}

// The activation's input: norm_weight * normalized + norm_bias, or without a norm just normalized.
template <typename T, typename Branch>
GC_DEVICE Acc<T> before_activation(const Branch& branch, Acc<T> normalized, int p) {
  if (branch.norm_weight.data == nullptr) return normalized;
  return read<T>(branch.norm_weight, p) * normalized + read<T>(branch.norm_bias, p);
}

// The sum of value(i) for i = first, first + step .. below end, in two levels. kAtOnce: loads in flight. kUnroll: less
// than those where a value is several loads.
template <typename A, int kAtOnce, int kUnroll = kAtOnce, typename Value>
GC_DEVICE A sum_in_chains(int first, int end, int step, const Value& value) {
  const int length = chain_length((end - first) / step + 1, kAtOnce) * step;
  A sum = 0;
  GC_UNROLL_BY(1)
  while (first < end) {
    const int chain_end = end - first < length ? end : first + length;
    A chain = 0;
    GC_UNROLL_BY(kUnroll)
    for (; first < chain_end; first += step) chain += value(first);
    sum += chain;
  }
  return sum;
}

// Every block takes its share of the lines.
GC_DEVICE void prefetch_share(const Prefetches& wanted) {
  GC_UNROLL_BY(1)
  for (int i = 0; i < wanted.count; ++i) {
    GC_UNROLL_BY(1)
    for (unsigned line = port::block_x() * kTransformThreads + port::thread_index(); line < wanted.lines[i];
         line += port::grid_x() * kTransformThreads) {
      port::prefetch_line(static_cast<const char*>(wanted.begin[i]) + static_cast<long long>(line) * kCacheLine);
    }
  }
}

template <typename A>
GC_DEVICE A warp_sum(A value) {
  GC_UNROLL
  for (int mask = 1; mask < kWarp; mask <<= 1) value += port::shuffle_xor(value, mask);
  return value;
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
