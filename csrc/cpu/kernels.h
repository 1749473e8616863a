// What the torch side of the CPU path (binding.cpp) and its vector side (vec/*.h) agree on: arguments on raw pointers,
// and one table of functions per instruction set. Each function works through a range of independent items, so that the
// caller may hand ranges to as many threads as it likes; no result depends on how the ranges are cut.
//
// Names: N images, C channels, S pixels. T is x's type; acc_t<T> the accumulation type.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cpu/plan.h"

namespace gc::cpu {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where the weights of the weighted sum over pixels come from.
enum class Weights { kUniform, kLogits, kMask };

template <typename T>
struct PoolArgs {
  Shape shape;
  Plan plan;
  Weights weights;
  bool divide_by_z;             // false: context is the plain weighted sum
  const T* x;                   // [N, C, S] or [N, S, C]
  const acc_t<T>* mask_weight;  // [C], kMask only
  acc_t<T> mask_bias;
  acc_t<T>* logits;    // [N, S], written (kMask), read (kLogits) or null
  acc_t<T>* partials;  // [N, splits, 2 + C]: m, z and the sum relative to m; the state itself where splits == 1
  acc_t<T>* state;     // [N, 2 + C]
  T* context;          // [N, C]
};

template <typename T>
struct PoolBackwardArgs {
  Shape shape;
  Plan plan;
  const acc_t<T>* grad_context;  // [N, C]
  const T* x;                    // [N, C, S] or [N, S, C]
  const acc_t<T>* mask_weight;   // [C] or null
  const acc_t<T>* logits;        // [N, S]
  const acc_t<T>* state;         // [N, 2 + C]
  T* grad_x;                     // like x
  acc_t<T>* grad_logits;         // [N, S] or null
  acc_t<T>* grad_mask_weight;    // [N, splits, C], partial sums, or null
};

template <typename T>
struct BroadcastArgs {
  Shape shape;
  const T* x;             // [N, C, S] or [N, S, C]
  const acc_t<T>* scale;  // [N, C] or null
  const acc_t<T>* term;   // [N, C] or null
  T* out;                 // like x
};

template <typename T>
struct BroadcastMulBackwardArgs {
  Shape shape;
  Plan plan;
  const T* grad;          // like x
  const T* x;             // [N, C, S] or [N, S, C]
  const acc_t<T>* scale;  // [N, C]
  T* grad_x;              // like x
  acc_t<T>* grad_scale;   // [N, splits, C], partial sums
  acc_t<T>* grad_term;    // [N, splits, C], partial sums
};

// out[group][i] = sum over the group's members, in their order
template <typename A>
struct ReduceArgs {
  const A* in;  // [groups, members, width]
  A* out;       // [groups, width]
  int64_t members;
  int64_t width;
};

template <typename T>
struct Kernels {
  // Units are (image, split) pairs, image by image: N * splits of them.
  void (*pool)(const PoolArgs<T>&, int64_t unit_begin, int64_t unit_end);
  void (*pool_merge)(const PoolArgs<T>&, int64_t image_begin, int64_t image_end);
  void (*pool_backward)(const PoolBackwardArgs<T>&, int64_t unit_begin, int64_t unit_end);
  void (*broadcast_mul_backward)(const BroadcastMulBackwardArgs<T>&, int64_t unit_begin, int64_t unit_end);
  // Elements are x's own, in memory order: N * C * S of them.
  void (*broadcast)(const BroadcastArgs<T>&, int64_t element_begin, int64_t element_end);
  void (*reduce)(const ReduceArgs<acc_t<T>>&, int64_t group_begin, int64_t group_end);
};

struct KernelSet {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<c10::Half> float16;
  Kernels<c10::BFloat16> bfloat16;
};

// Null where the compiler or the machine type has no such instruction set.
const KernelSet* default_kernels();
const KernelSet* avx2_kernels();
const KernelSet* avx512_kernels();

}  // namespace gc::cpu
