// Backward of the transform, for one or two branches, in one launch. It begins with grad_out, the gradient of each
// branch's output after its gate. Let dt be the gradient before the gate and v the activation's input. Then
//
//   grad_b2          = sum_n dt
//   grad_w2          = sum_n dt (x) y
//   dv               = act'(v) * W2^T dt
//   grad_norm_weight = sum_n dv * normalized
//   grad_norm_bias   = sum_n dv
//   dn               = norm_weight * dv
//   dh               = inverse_deviation * (dn - mean(dn) - normalized * mean(dn * normalized)), or dv without a norm
//   grad_b1          = sum_n dh
//   grad_w1          = sum_n dh (x) context
//   grad_context     = factor * W1^T dh, summed over the branches
//
// normalized and inverse_deviation are the forward pass's.
//
// Decomposition: three phases (phases.h): the output layer with W2, the norm, the input layer with W1. In the first and
// the third a block takes slabs of the matrix, see transform_slab.h; in the second it takes images.
// merging_transform_backward adds up grad_out from what the launch before has left of each split (late_merge.h).
//
// normalized_transform_backward is that of the residual tail, whose context is that of y - mean: wherever the context is
// read it is slope * context + bias. grad_out is the sums over g, of channel_mul slope * product_sums + bias * sums.
//
// Moves: W1, W2 and their gradients once; N * (slabs of C * P + slabs of P * C) partial values, written and read.
// What it merges of C channels, it reads once for each slab beside another, and once for the bias.
#pragma once

#include "late_merge.h"
#include "tail_backward_args.h"
#include "transform_slab.h"

namespace gc {

template <typename A>
struct TransformBackwardShared {
  int* ticket;  // of the phase
  int* flag;    // of arrive_last
  SlabShared<A> slab;

  template <typename Arena>
  GC_SHARED TransformBackwardShared(Arena& arena, int steps)
      : ticket(arena.template take<int>(1)), flag(arena.template take<int>(1)), slab(arena, steps) {}
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "split_merge.h"

namespace gc {

// ---- the first phase: out = gate(W2 . y + b2) ----

// Of the partial sums that make a value of grad_out, the loads in flight. 0 where it is complete.
template <int kSteps, bool kMerging>
inline constexpr int kGradLoads = !kMerging                    ? 0
                                  : registers_are_full(kSteps) ? kGathered / 2
                                                               : kGathered;

// Rows are channels, columns hidden units. partial_out: A [N, splits, C], with kLoads > 0.
template <typename T, int kLoads, typename Args>
struct OutputLayer : Layer<Acc<T>> {
  using A = Acc<T>;
  const Args& args;
  const TransformGradients& branch;
  const A* partial_out;
  static constexpr bool kStagedFirst = kLoads > 0;

  GC_DEVICE OutputLayer(const Args& args_, const TransformGradients& branch_, const void* partial_out_)
      : args(args_), branch(branch_), partial_out(static_cast<const A*>(partial_out_)) {
    this->rows = args.channels;
    this->columns = branch.hidden;
    this->images = args.images;
    this->matrix = branch.w2;
    this->grad_matrix = branch.grad_w2;
    this->partial_in = args.grid.phases > 1 ? static_cast<A*>(branch.partial_y) : nullptr;
  }

  GC_DEVICE void await_inputs() const {}  // earlier launches have computed them

  GC_DEVICE A merged(int n, int c) const {
    const int splits = args.partial.splits;
    const long long first = static_cast<long long>(n) * splits * args.channels + c;
    return sum_of_splits<kLoads>(partial_out + first, splits, args.channels);
  }
  // dt
  GC_DEVICE A grad_out(int n, int c) const {
    const long long i = static_cast<long long>(n) * args.channels + c;
    A grad;
    if constexpr (kLoads > 0) {
      grad = merged(n, c);
    } else {
      grad = static_cast<const A*>(branch.grad_out)[i];
    }
    if (branch.gate == Gate::kNone) return grad;
    if constexpr (Args::kNormalized) {
      const A product_sum = static_cast<const A*>(args.product_sums)[i];
      grad = slope_at<T>(args.norm, c) * product_sum + bias_at<T>(args.norm, c) * grad;
    }
    return gate_backward(branch.gate, grad, static_cast<const A*>(branch.gate_out)[i]);
  }

  // y of one hidden unit.
  struct Column {
    const TransformBackwardArgs& args;
    const TransformGradients& branch;
    const A* normalized;  // of this unit and the first image
    bool with_norm;
    A weight, bias;

    GC_DEVICE A of(int n) const {
      const A value = normalized[static_cast<long long>(n) * branch.hidden];
      return activate(args.activation, with_norm ? weight * value + bias : value);
    }
  };
  GC_DEVICE Column column(int p) const {
    const bool with_norm = branch.norm_weight.data != nullptr;
    const A weight = with_norm ? read<T>(branch.norm_weight, p) : A(1);
    const A bias = with_norm ? read<T>(branch.norm_bias, p) : A(0);
    return {args, branch, static_cast<const A*>(branch.normalized) + p, with_norm, weight, bias};
  }
};

template <typename T, int kSteps, bool kMerging, typename Args>
GC_DEVICE void output_backward(const Args& args, const TransformGradients& branch, const void* partial_out,
                               const Phase& phase, int first, const SlabShared<Acc<T>>& shared,
                               ImageSums<T, kSteps>& image_sums) {
  const OutputLayer<T, kGradLoads<kSteps, kMerging>, Args> layer(args, branch, partial_out);
  const int slabs = slabs_down(layer.rows, kSteps) * slabs_across(layer.columns);
  for (int number = first; number < slabs; number += phase.blocks()) {
    const Slab slab = slab_at<kSteps>(number, layer.rows);
    if (layer.has_work()) slab_backward<T, kSteps>(layer, slab, shared);
    if (slab.column0 == 0) {
      image_sums.template write_sums<kMerging ? 1 : kImagesAtOnce>(branch.grad_b2, slab,
                                                                   [&](int n, int c) { return layer.grad_out(n, c); });
    }
  }
}

// ---- the second phase: y = act(norm(h)) ----

inline constexpr int kNormScratch = kTransformThreads + 2 * kTransformWarps;

// grad_y (dv above) and grad_hidden (dh) of one image. slabs: of W2, above each other, whose partial results of the
// gradient of y are added up here. scratch: [kNormScratch] in shared memory.
template <typename T>
GC_DEVICE void norm_backward(const TransformBackwardArgs& args, const TransformGradients& branch, int n, int slabs,
                             Acc<T>* scratch) {
  using A = Acc<T>;
  const int thread = port::thread_index();
  const long long n0 = static_cast<long long>(n) * branch.hidden;
  const A* const normalized = static_cast<const A*>(branch.normalized) + n0;
  const A* const partial_y = static_cast<const A*>(branch.partial_y) + n0;
  A* const grad_y = static_cast<A*>(branch.grad_y) + n0;
  A* const grad_hidden = static_cast<A*>(branch.grad_hidden) + n0;
  A* const warp_sums = scratch + kTransformThreads;  // [2, kTransformWarps]
  const bool with_norm = branch.norm_weight.data != nullptr;
  // The block takes this many hidden units at once. Where it has more threads than they are, several threads add up the
  // partial results of a unit, each those of a range of slabs.
  int units = kTransformThreads;
  while (units / 2 >= branch.hidden && units > kWarp) units /= 2;
  const int adders = kTransformThreads / units;
  const int own_slabs = (slabs + adders - 1) / adders;
  const int first_slab = thread / units * own_slabs;
  const int end_slab = first_slab + own_slabs < slabs ? first_slab + own_slabs : slabs;
  A sum = 0;          // of dn
  A product_sum = 0;  // of dn * normalized
  for (int p0 = 0; p0 < branch.hidden; p0 += units) {
    const int p = p0 + thread % units;
    A dy = 0;
    if (p < branch.hidden) {
      dy = sum_in_chains<A, 8>(first_slab, end_slab, 1, [&](int k) {
        return partial_y[static_cast<long long>(k) * args.images * branch.hidden + p];
      });
    }
    if (adders > 1) {  // in that case the loop has only this round
      scratch[thread] = dy;
      port::sync_block<kSyncNormParts>();
      for (int other = 1; other < adders; ++other) dy += scratch[other * units + thread % units];
    }
    if (thread >= units || p >= branch.hidden) continue;
    dy = activate_backward(args.activation, dy, before_activation<T>(branch, normalized[p], p));
    grad_y[p] = dy;
    if (!with_norm) {
      grad_hidden[p] = dy;
      continue;
    }
    const A dn = read<T>(branch.norm_weight, p) * dy;
    sum += dn;
    product_sum += dn * normalized[p];
  }
  if (!with_norm) return;
  sum = warp_sum(sum);
  product_sum = warp_sum(product_sum);
  if (thread % kWarp == 0) {
    warp_sums[thread / kWarp] = sum;
    warp_sums[kTransformWarps + thread / kWarp] = product_sum;
  }
  port::sync_block<kSyncNormSums>();
  sum = product_sum = 0;
  GC_UNROLL
  for (int w = 0; w < kTransformWarps; ++w) {
    sum += warp_sums[w];
    product_sum += warp_sums[kTransformWarps + w];
  }
  const A mean = sum / static_cast<A>(branch.hidden);
  const A product_mean = product_sum / static_cast<A>(branch.hidden);
  const A inverse_deviation = static_cast<const A*>(branch.inverse_deviation)[n];
  // An infinity in a sum gives NaN to the whole image. PyTorch on a CPU does so too, or leaves some of it infinite.
  const A not_finite = (mean - mean) + (product_mean - product_mean);
  if (thread >= units) return;
  for (int p = thread; p < branch.hidden; p += units) {  // the units whose grad_y this thread has written
    const A dn = read<T>(branch.norm_weight, p) * grad_y[p];
    grad_hidden[p] = inverse_deviation * (dn - mean - normalized[p] * product_mean) + not_finite;
  }
}

// ---- the third phase: h = W1 . context + b1 ----

// Rows are hidden units, columns channels.
template <typename T, typename Args>
struct InputLayer : Layer<Acc<T>> {
  using A = Acc<T>;
  const Args& args;
  const TransformGradients& branch;
  PreviousPhase& previous;

  GC_DEVICE InputLayer(const Args& args_, const TransformGradients& branch_, PreviousPhase& previous_)
      : args(args_), branch(branch_), previous(previous_) {
    this->rows = branch.hidden;
    this->columns = args.channels;
    this->images = args.images;
    this->matrix = branch.w1;
    this->grad_matrix = branch.grad_w1;
    this->partial_in = args.grad_context != nullptr ? static_cast<A*>(branch.partial_context) : nullptr;
  }

  GC_DEVICE void await_inputs() const { previous.await(); }

  GC_DEVICE A unit(const void* values, int n, int p) const {
    return static_cast<const A*>(values)[static_cast<long long>(n) * branch.hidden + p];
  }
  GC_DEVICE A grad_out(int n, int p) const { return unit(branch.grad_hidden, n, p); }
  GC_DEVICE A grad_norm_weight(int n, int p) const { return unit(branch.grad_y, n, p) * unit(branch.normalized, n, p); }
  GC_DEVICE A grad_norm_bias(int n, int p) const { return unit(branch.grad_y, n, p); }

  // The context in one channel.
  struct Column {
    const Args& args;
    const A* context;  // of this channel and the first image
    A slope, bias;     // of a normalized context

    GC_DEVICE A of(int n) const {
      const A value = context[n * args.context_stride];
      return Args::kNormalized ? slope * value + bias : value;
    }
  };
  GC_DEVICE Column column(int c) const {
    const A* const context = static_cast<const A*>(args.context) + c;
    if constexpr (Args::kNormalized) return {args, context, slope_at<T>(args.norm, c), bias_at<T>(args.norm, c)};
    return {args, context, A(1), A(0)};
  }
};

// The last block to have finished a slab of these columns adds up the partial results of all of them, in order of
// branches and slabs.
template <typename T, int kSteps>
GC_DEVICE void add_partial_contexts(const TransformBackwardArgs& args, int column0, int* flag) {
  using A = Acc<T>;
  const int slabs[2] = {slabs_down(args.branch[0].hidden, kSteps),
                        args.branches > 1 ? slabs_down(args.branch[1].hidden, kSteps) : 0};
  if (!arrive_last(args.counters + kPhaseCounters + column0 / kWarp, slabs[0] + slabs[1], flag)) return;
  const long long count = static_cast<long long>(args.images) * args.channels;
  const int column = column0 + port::thread_index() % kWarp;
  if (column >= args.channels) return;
  constexpr int kAtOnce = 4;  // images that a warp takes at a time: as many loads are in flight
  for (int n0 = port::thread_index() / kWarp; n0 < args.images; n0 += kAtOnce * kTransformWarps) {
    const auto at = [&](int i) { return static_cast<long long>(n0 + i * kTransformWarps) * args.channels + column; };
    A sum[kAtOnce];
    GC_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sum[i] = 0;
    GC_UNROLL
    for (int b = 0; b < 2; ++b) {
      const A* const partials =
          static_cast<const A*>(b == 0 ? args.branch[0].partial_context : args.branch[1].partial_context);
      GC_UNROLL_BY(4)
      for (int k = 0; k < slabs[b]; ++k) {
        GC_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (n0 + i * kTransformWarps < args.images) sum[i] += partials[k * count + at(i)];
        }
      }
    }
    GC_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (n0 + i * kTransformWarps < args.images) {
        static_cast<A*>(args.grad_context)[at(i)] = static_cast<A>(args.factor) * sum[i];
      }
    }
  }
}

template <typename T, int kSteps, typename Args>
GC_DEVICE void input_backward(const Args& args, const TransformGradients& branch, const Phase& phase, int first,
                              const TransformBackwardShared<Acc<T>>& shared, ImageSums<T, kSteps>& image_sums,
                              PreviousPhase& previous) {
  const InputLayer<T, Args> layer(args, branch, previous);
  const int slabs = slabs_down(layer.rows, kSteps) * slabs_across(layer.columns);
  for (int number = first; number < slabs; number += phase.blocks()) {
    const Slab slab = slab_at<kSteps>(number, layer.rows);
    if (layer.has_work()) slab_backward<T, kSteps>(layer, slab, shared.slab);
    if (layer.partial_in != nullptr) add_partial_contexts<T, kSteps>(args, slab.column0, shared.flag);
    // The first slabs beside each other take a vector each. Where there are fewer slabs, the last takes the rest.
    const int across = slab.column0 / kWarp;
    const bool is_last = slab.column0 + kWarp >= args.channels;
    layer.await_inputs();
    if (across == 0) {
      image_sums.write_sums(branch.grad_b1, slab, [&](int n, int p) { return layer.grad_out(n, p); });
    }
    if (across == 1 || (across < 1 && is_last)) {
      image_sums.write_sums(branch.grad_norm_weight, slab, [&](int n, int p) { return layer.grad_norm_weight(n, p); });
    }
    if (across == 2 || (across < 2 && is_last)) {
      image_sums.write_sums(branch.grad_norm_bias, slab, [&](int n, int p) { return layer.grad_norm_bias(n, p); });
    }
  }
}

// ---- the kernel ----

template <typename T, int kSteps, bool kMerging, typename Args>
GC_DEVICE void backward_phases(const Args& args) {
  using A = Acc<T>;
  port::let_next_launch_begin();
  port::SharedArena arena;
  const TransformBackwardShared<A> shared(arena, kSteps);
  if constexpr (port::kLaunchesOverlap) prefetch_share(args.prefetches);
  port::wait_for_launch_before<kWaitTransformBackward>();
  ImageSums<T, kSteps> image_sums(args.images, shared.slab.image_sums);
  if (args.zero.data != nullptr && port::block_x() == 0 && port::thread_index() == 0) write<T>(args.zero, 0, A(0));
  const Phase phase(args.grid, args.counters, shared.ticket);
  PreviousPhase previous(phase);
  int turn = 0;
  GC_UNROLL_BY(1)
  for (int b = 0; b < args.branches; ++b) {
    const TransformGradients branch = b == 0 ? args.branch[0] : args.branch[1];
    // The branches begin at opposite ends: a block that has one slab less of one branch may have one more of the other.
    const int first = b == 0 ? phase.block() : phase.blocks() - 1 - phase.block();
    if (phase.number() == 0) {
      const void* const partial_out = !kMerging ? nullptr : b == 0 ? args.partial.sums[0] : args.partial.sums[1];
      output_backward<T, kSteps, kMerging>(args, branch, partial_out, phase, first, shared.slab, image_sums);
    } else if (phase.number() == 1) {
      previous.await();
      // Two areas of scratch are used in turn, as in ImageSums. Nothing else needs the slabs' sums in this phase.
      static_assert(2 * kNormScratch <= kTransformWarps * kSlabImages * kWarp, "the scratch fits there");
      for (int n = first; n < args.images; n += phase.blocks(), ++turn) {
        norm_backward<T>(args, branch, n, slabs_down(args.channels, kSteps),
                         shared.slab.sums + turn % 2 * kNormScratch);
      }
    } else {
      input_backward<T, kSteps>(args, branch, phase, first, shared, image_sums, previous);
    }
  }
  previous.await();
  phase.finish();
}

// A block takes slabs of kSteps * kStepRows rows.
template <typename T, int kSteps>
GC_KERNEL(kTransformThreads, 2)
transform_backward(const TransformBackwardArgs args) {
  backward_phases<T, kSteps, false>(args);
}

template <typename T, int kSteps>
GC_KERNEL(kTransformThreads, 2)
merging_transform_backward(const TransformBackwardArgs args) {
  backward_phases<T, kSteps, true>(args);
}

template <typename T, int kSteps>
GC_KERNEL(kTransformThreads, 2)
normalized_transform_backward(const NormalizedTransformBackwardArgs args) {
  backward_phases<T, kSteps, false>(args);
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
