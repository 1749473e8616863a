// What the torch side of the CPU path (device.cpp, transform.h) and its vector side (simd/*.h) agree on: arguments on
// raw pointers, and one table of functions for each instruction set. Each function works through a range of independent
// items, so that the caller may hand ranges to as many threads as it likes; no result depends on where the ranges end.
//
// Names: N images, C channels, S pixels; README.md has the words for parts of the work. T is x's type and acc_t<T> its
// accumulation type.
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

template <typename T>
struct PoolArgs {
  Shape shape;
  Plan plan;
  Weighting weighting;
  bool divide_by_z;             // false: context is the plain weighted sum
  const T* x;                   // [N, C, S] or [N, S, C]
  const acc_t<T>* mean;         // [C], or null: x - mean takes the place of x
  int64_t mean_stride;          // from image to image: 0, or C where each image has a mean of its own
  const acc_t<T>* mask_weight;  // [C], kMask only
  acc_t<T> mask_bias;
  acc_t<T>* logits;    // [N, S]: written (kMask), read (kLogits) or null (kUniform)
  acc_t<T>* partials;  // [N, splits, 2 + C]: m, z and the sum relative to m; the state itself where splits == 1
  acc_t<T>* state;     // [N, 2 + C]
  T* context;          // [N, C] or null
};

// a                = softmax(logits)
// dl[s]            = a[s] * (grad_context . (x[:, s] - context))
// grad_mask_weight = sum_s dl[s] * x[:, s]
template <typename T>
struct PoolBackwardArgs {
  Shape shape;
  Plan plan;
  const acc_t<T>* grad_context;  // [N, C]
  const T* x;                    // [N, C, S] or [N, S, C]
  const acc_t<T>* mean;          // [C], or null: x - mean takes the place of x
  const acc_t<T>* logits;        // [N, S]
  const acc_t<T>* state;         // [N, 2 + C]
  acc_t<T>* attention;           // [N, S]: a
  acc_t<T>* grad_logits;         // [N, S]: dl
  acc_t<T>* grad_logits_sums;    // [N, splits]: partial sums of dl
  acc_t<T>* grad_mask_weight;    // [N, splits, C]: partial sums, or null
};

// grad_x[c, s] = grad[c, s] * scale[c] + a[s] * grad_context[c] + dl[s] * mask_weight[c]
template <typename T>
struct GradXArgs {
  Shape shape;
  const T* grad;                 // like x: what reaches grad_x past the pooling; null: nothing does
  const acc_t<T>* scale;         // [N, C], or null: 1. Only grad needs it
  const acc_t<T>* attention;     // [N, S]: a
  const acc_t<T>* grad_context;  // [N, C]
  const acc_t<T>* grad_logits;   // [N, S]: dl. Only mask_weight needs it
  const acc_t<T>* mask_weight;   // [C], or null: the logits do not depend on x, and grad is null as well
  T* grad_x;                     // like x
  bool stream;                   // write past the caches
};

// out[c, s] = x[c, s] * scale[c] + term[c]
template <typename T>
struct BroadcastArgs {
  Shape shape;
  const T* x;             // [N, C, S] or [N, S, C]
  const acc_t<T>* scale;  // [N, C], or null: 1
  const acc_t<T>* term;   // [N, C], or null: 0
  T* out;                 // like x
  bool stream;            // write past the caches
};

// grad_x[c, s]  = grad[c, s] * scale[c]
// grad_scale[c] = sum_s grad[c, s] * x[c, s]
// grad_term[c]  = sum_s grad[c, s]
//
// All three, or without grad_x one or both of the sums. What is not wanted is null, and so is what only that needs.
template <typename T>
struct BroadcastBackwardArgs {
  Shape shape;
  Plan plan;
  const T* grad;          // like x
  const T* x;             // [N, C, S] or [N, S, C]. Only grad_scale needs it
  const acc_t<T>* scale;  // [N, C]. Only grad_x needs it
  T* grad_x;              // like x
  acc_t<T>* grad_scale;   // [N, splits, C]: partial sums
  acc_t<T>* grad_term;    // [N, splits, C]: partial sums
};

// Of the pixels of each split, with a centre near their mean:
//
//   sums[c]    = sum_s (y[c, s] - centre[c])
//   squares[c] = sum_s (y[c, s] - centre[c])^2
template <typename T>
struct StatisticsArgs {
  Shape shape;
  Plan plan;
  const T* y;         // [N, C, S] or [N, S, C]
  acc_t<T>* centre;   // [N, splits, C]: written
  acc_t<T>* sums;     // [N, splits, C]
  acc_t<T>* squares;  // [N, splits, C]
};

// out[c, s] = relu((y[c, s] - mean[c]) * slope[c] + shift[c] + identity[c, s])
template <typename T>
struct ResidualArgs {
  Shape shape;
  const T* y;             // [N, C, S] or [N, S, C]
  const T* identity;      // like y, or null
  const acc_t<T>* mean;   // [C]
  const acc_t<T>* slope;  // [N, C]
  const acc_t<T>* shift;  // [N, C]
  T* out;                 // like y
  bool relu;
  bool stream;  // write past the caches
};

// grad_in[c, s]   = grad[c, s] where out[c, s] is not below or at 0; grad itself without a ReLU
// sums[c]         = sum_s grad_in[c, s]
// product_sums[c] = sum_s grad_in[c, s] * (y[c, s] - mean[c])
template <typename T>
struct ResidualSumsArgs {
  Shape shape;
  Plan plan;
  const T* grad;           // [N, C, S] or [N, S, C]
  const T* out;            // like grad, or null: no ReLU
  T* grad_in;              // like grad; only with out
  const T* y;              // like grad; only product_sums need it
  const acc_t<T>* mean;    // [C], or [N, C]; only product_sums need it
  int64_t mean_stride;     // from image to image: 0, or C
  acc_t<T>* sums;          // [N, splits, C]: partial sums
  acc_t<T>* product_sums;  // [N, splits, C]: partial sums, or null
  bool stream;             // write past the caches
};

// grad_y[c, s] = grad[c, s] * scale[c] + (y[c, s] - mean[c]) * curve[c] + term[c]
//                + a[s] * grad_context[c] + dl[s] * mask_weight[c]
template <typename T>
struct GradYArgs {
  Shape shape;
  const T* grad;                 // like y
  const T* y;                    // [N, C, S] or [N, S, C]
  const acc_t<T>* scale;         // [N, C]
  const acc_t<T>* mean;          // [C]
  const acc_t<T>* curve;         // [C]
  const acc_t<T>* term;          // [N, C]
  const acc_t<T>* attention;     // [N, S]: a, or null: neither this nor what follows is there
  const acc_t<T>* grad_logits;   // [N, S]: dl
  const acc_t<T>* grad_context;  // [N, C]
  const acc_t<T>* mask_weight;   // [C]
  T* grad_y;                     // like y
  bool stream;                   // write past the caches
};

// out[n] = gate(weight in[n] + bias). W is the type of the weight.
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
  Gate gate;  // may be none
};

// grad_weight[row, column] = sum_n grad[n, row] * in[n, column]
// grad_bias[row]           = sum_n grad[n, row]
// grad_in[n, column]       = sum_row weight[row, column] * grad[n, row]
//
// Any of them may be null, and so may what only that one needs.
template <typename W>
struct LinearBackwardArgs {
  const W* weight;       // [rows, columns]
  const acc_t<W>* grad;  // [images, rows]
  const acc_t<W>* in;    // [images, in_stride], of which `columns` count
  W* grad_weight;        // [rows, columns]
  acc_t<W>* grad_bias;   // [rows]
  acc_t<W>* grad_in;     // [chunks, images, columns]: partial sums
  int64_t images;
  int64_t rows;
  int64_t columns;
  int64_t in_stride;
  Pieces pieces;
};

// Of each image:
//
//   normalized = (hidden - mean) * inverse_deviation
//   activated  = activation(weight * normalized + bias)
//
// Without a norm, normalized = hidden and activated = activation(hidden).
template <typename A>
struct NormalizeArgs {
  A* hidden;             // [images, width]: becomes normalized
  A* inverse_deviation;  // [images]: written, 1 without a norm
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
  A* grad;                     // [images, width]: the gradient of activated becomes that of hidden
  A* grad_weight;              // [width]: written with a norm
  A* grad_bias;                // [width]: written with a norm
  int64_t images;
  int64_t width;
  Activation activation;
};

// out[group, i] = sum_member in[group, member, i], always in the same order
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
  // Splits are numbered through all images: there are N * plan.splits.
  void (*pool)(const PoolArgs<T>&, int64_t split_begin, int64_t split_end);
  void (*pool_merge)(const PoolArgs<T>&, int64_t image_begin, int64_t image_end);
  void (*pool_backward)(const PoolBackwardArgs<T>&, int64_t split_begin, int64_t split_end);
  void (*pool_backward_balance)(const PoolBackwardArgs<T>&, int64_t split_begin, int64_t split_end);
  void (*broadcast_backward)(const BroadcastBackwardArgs<T>&, int64_t split_begin, int64_t split_end);
  void (*statistics)(const StatisticsArgs<T>&, int64_t split_begin, int64_t split_end);
  void (*residual_sums)(const ResidualSumsArgs<T>&, int64_t split_begin, int64_t split_end);
  // Strips are numbered through all images: there are N * make_strips(shape).count().
  void (*residual)(const ResidualArgs<T>&, int64_t strip_begin, int64_t strip_end);
  void (*grad_y)(const GradYArgs<T>&, int64_t strip_begin, int64_t strip_end);
  void (*broadcast)(const BroadcastArgs<T>&, int64_t strip_begin, int64_t strip_end);
  void (*grad_x)(const GradXArgs<T>&, int64_t strip_begin, int64_t strip_end);
  // Elements are those of the result: there are groups * width.
  void (*reduce)(const ReduceArgs<acc_t<T>>&, int64_t element_begin, int64_t element_end);

  // Of the transform. Groups have kLinearRows rows; pieces of the weight are numbered through all chunks.
  void (*linear)(const LinearArgs<T>&, int64_t group_begin, int64_t group_end);
  void (*linear_backward)(const LinearBackwardArgs<T>&, int64_t piece_begin, int64_t piece_end);
  void (*normalize)(const NormalizeArgs<acc_t<T>>&, int64_t image_begin, int64_t image_end);
  void (*activate)(const NormalizeArgs<acc_t<T>>&, int64_t image_begin, int64_t image_end);  // from normalized
  void (*normalize_backward)(const NormalizeBackwardArgs<acc_t<T>>&);
  // grad[i], the gradient of what left the gate as scale[i], becomes that of what entered the gate.
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
