// What the forward and the backward kernel of the transform share.
#pragma once

#include "phases.h"
#include "tile.h"
#include "transform_geometry.h"

namespace gc {

// The functions and their derivatives are PyTorch's, with its results for NaN and at the edges.

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

// The gradient before the activation from that behind it.
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

// The gradient before the gate from that behind it and from what left it.
template <typename A>
GC_DEVICE A gate_backward(Gate gate, A grad, A out) {
  if (gate == Gate::kSigmoid) return grad * out * (A(1) - out);
  return out > A(0) && out < A(1) ? grad / A(6) : A(0);
}

// What goes into the activation: the norm's weight and bias on what it left, or that itself without a norm.
template <typename T, typename Branch>
GC_DEVICE Acc<T> before_activation(const Branch& branch, Acc<T> normalized, int p) {
  if (branch.norm_weight.data == nullptr) return normalized;
  return read<T>(branch.norm_weight, p) * normalized + read<T>(branch.norm_bias, p);
}

// The sum of value(i) for i = first, first + step .. below end, in two levels. kAtOnce: loads in flight.
template <typename A, int kAtOnce, typename Value>
GC_DEVICE A sum_in_blocks(int first, int end, int step, const Value& value) {
  const int block = block_of_terms((end - first) / step + 1, kAtOnce) * step;
  A sum = 0;
  GC_UNROLL_BY(1)
  while (first < end) {
    const int block_end = end - first < block ? end : first + block;
    A part = 0;
    GC_UNROLL_BY(kAtOnce)
    for (; first < block_end; first += step) part += value(first);
    sum += part;
  }
  return sum;
}

template <typename A>
GC_DEVICE A warp_sum(A value) {
  GC_UNROLL
  for (int mask = 1; mask < kWarp; mask <<= 1) value += port::shuffle_xor(value, mask);
  return value;
}

}  // namespace gc
