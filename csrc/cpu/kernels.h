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
#include "ops/policy.h"

namespace gc::cpu {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

using Weights = Weighting;

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
  T* context;          // [N, C] or null
};

// a = softmax(logits), dl = a * (grad_context . (x - context)), grad_mask_weight = sum_s dl * x
template <typename T>
struct PoolBackwardArgs {
  Shape shape;
  Plan plan;
  const acc_t<T>* grad_context;  // [N, C]
  const T* x;                    // [N, C, S] or [N, S, C]
  const acc_t<T>* logits;        // [N, S]
  const acc_t<T>* state;         // [N, 2 + C]
  acc_t<T>* attention;           // [N, S]: a
  acc_t<T>* grad_logits;         // [N, S]: dl
  acc_t<T>* grad_logits_sums;    // [N, splits]: sums of the dl
  acc_t<T>* grad_mask_weight;    // [N, splits, C], partial sums, or null
};

// grad_x = grad * scale + a * grad_context + dl * mask_weight
template <typename T>
struct GradXArgs {
  Shape shape;
  const T* grad;                 // like x: what reaches grad_x past the pooling; null without mask_weight
  const acc_t<T>* scale;         // [N, C], or null for 1; for grad only
  const acc_t<T>* attention;     // [N, S]
  const acc_t<T>* grad_context;  // [N, C]
  const acc_t<T>* grad_logits;   // [N, S]; for mask_weight only
  const acc_t<T>* mask_weight;   // [C] or null
  T* grad_x;                     // like x
  bool stream;                   // write past the caches
};

template <typename T>
struct BroadcastArgs {
  Shape shape;
  const T* x;             // [N, C, S] or [N, S, C]
  const acc_t<T>* scale;  // [N, C] or null
  const acc_t<T>* term;   // [N, C] or null
  T* out;                 // like x
  bool stream;            // write past the caches
};

// All three results, or without grad_x one or both of the others; absent ones are null, and what only they need.
template <typename T>
struct BroadcastBackwardArgs {
  Shape shape;
  Plan plan;
  const T* grad;          // like x
  const T* x;             // [N, C, S] or [N, S, C]; for grad_scale
  const acc_t<T>* scale;  // [N, C]; for grad_x
  T* grad_x;              // like x
  acc_t<T>* grad_scale;   // [N, splits, C], partial sums
  acc_t<T>* grad_term;    // [N, splits, C], partial sums
};

// out[n] = weight in[n] + bias, or the sigmoid of it. W is the type of the weight.
template <typename W>
struct LinearArgs {
  const W* weight;       // [rows, columns]
  const acc_t<W>* bias;  // [rows]
  const acc_t<W>* in;    // [images, in_stride], of which `columns` count
  acc_t<W>* out;         // [images, rows]
  int64_t images;
  int64_t rows;
  int64_t columns;
  int64_t in_stride;
  Gate gate;  // of out
};

// grad_weight = sum_n grad[n] (x) in[n], grad_bias = sum_n grad[n], grad_in[n] = weight^T grad[n]; any may be absent
// (null), and what only it needs.
template <typename W>
struct LinearBackwardArgs {
  const W* weight;       // [rows, columns]
  const acc_t<W>* grad;  // [images, rows]
  const acc_t<W>* in;    // [images, in_stride], of which `columns` count
  W* grad_weight;        // [rows, columns]
  acc_t<W>* grad_bias;   // [rows]
  acc_t<W>* grad_in;     // [chunks, images, columns], partial sums
  int64_t images;
  int64_t rows;
  int64_t columns;
  int64_t in_stride;
  Pieces pieces;
};

// normalized = (hidden - mean) * inverse_deviation, activated = act(weight * normalized + bias), image by image;
// without a norm, normalized is hidden and activated = act(hidden)
template <typename A>
struct NormalizeArgs {
  A* hidden;             // [images, width]; becomes normalized
  A* inverse_deviation;  // [images]
  const A* weight;       // [width], or null: no norm
  const A* bias;         // [width]
  A* activated;          // [images, width]
  int64_t width;
  double eps;
  Activation activation;
};

template <typename A>
struct NormalizeBackwardArgs {
  const A* normalized;         // [images, width]
  const A* inverse_deviation;  // [images]
  const A* weight;             // [width], or null: no norm
  const A* bias;               // [width]
  A* grad;                     // [images, width]: of activated; becomes that of hidden
  A* grad_weight;              // [width], with a norm
  A* grad_bias;                // [width], with a norm
  int64_t images;
  int64_t width;
  Activation activation;
};

// out[group][i] = sum over the group's members, always in the same order
template <typename A>
struct ReduceArgs {
  const A* in;  // [groups, members, width]
  A* out;       // [groups, width]
  int64_t groups;
  int64_t members;
  int64_t width;
};

template <typename T>
struct Kernels {
  // Units are (image, split) pairs, image by image: N * splits of them.
  void (*pool)(const PoolArgs<T>&, int64_t unit_begin, int64_t unit_end);
  void (*pool_merge)(const PoolArgs<T>&, int64_t image_begin, int64_t image_end);
  void (*pool_backward)(const PoolBackwardArgs<T>&, int64_t unit_begin, int64_t unit_end);
  void (*pool_backward_balance)(const PoolBackwardArgs<T>&, int64_t unit_begin, int64_t unit_end);
  void (*broadcast_backward)(const BroadcastBackwardArgs<T>&, int64_t unit_begin, int64_t unit_end);
  // Units of make_rows, image by image.
  void (*broadcast)(const BroadcastArgs<T>&, int64_t unit_begin, int64_t unit_end);
  void (*grad_x)(const GradXArgs<T>&, int64_t unit_begin, int64_t unit_end);
  // Elements are those of the result: groups * width of them.
  void (*reduce)(const ReduceArgs<acc_t<T>>&, int64_t element_begin, int64_t element_end);

  // Of the transform. Units are groups of kLinearRows rows, and pieces of the weight, chunk by chunk.
  void (*linear)(const LinearArgs<T>&, int64_t group_begin, int64_t group_end);
  void (*linear_backward)(const LinearBackwardArgs<T>&, int64_t piece_begin, int64_t piece_end);
  void (*normalize)(const NormalizeArgs<acc_t<T>>&, int64_t image_begin, int64_t image_end);
  void (*activate)(const NormalizeArgs<acc_t<T>>&, int64_t image_begin, int64_t image_end);  // from normalized
  void (*normalize_backward)(const NormalizeBackwardArgs<acc_t<T>>&);
  // grad[i], of what left the gate as scale[i], becomes that of what entered it.
  void (*gate_backward)(Gate gate, const acc_t<T>* scale, acc_t<T>* grad, int64_t count);
  void (*widen)(const T* in, acc_t<T>* out, int64_t count);
  void (*narrow)(const acc_t<T>* in, T* out, int64_t count);
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
