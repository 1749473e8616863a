// Gates and activations, and their derivatives. They are PyTorch's, with its results for NaN and at the edges of their
// ranges.
#pragma once

#include "cpu/simd/lanes.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

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

// The gradient of v from that of activation(v).
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

template <typename A>
void gate_backward(Gate gate, const A* scale, A* grad, int64_t count) {
  using V = Vec<A>;
  const V zero(A(0)), one(A(1)), six(A(6));
  for_each_vector<V::size()>(0, count, [&](int64_t i, int n, auto) {
    const V s = V::loadu(scale + i, n);
    const V g = V::loadu(grad + i, n);
    if (gate == Gate::kSigmoid) {
      (g * s * (one - s)).store(grad + i, n);
    } else {  // NaN passes nothing, as in PyTorch
      V::blendv(V::blendv(zero, g / six, s > zero), zero, s >= one).store(grad + i, n);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
