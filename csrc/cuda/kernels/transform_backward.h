// Backward of the transform, for one or two branches, in one launch. From grad_out, the gradient of each branch's
// output behind its gate, with dt that before the gate and v what goes into the activation:
//
//   grad_b2 = sum_n dt                  grad_w2 = sum_n dt (x) y                 dv = act'(v) * W2^T dt
//   grad_norm_weight = sum_n dv * normalized      grad_norm_bias = sum_n dv      dn = norm_weight * dv
//   dh = inverse_deviation * (dn - mean dn - normalized * mean(dn * normalized)), or dv without a norm
//   grad_b1 = sum_n dh                  grad_w1 = sum_n dh (x) context           grad_context = factor * W1^T dh
//
// the last one summed over the branches. normalized and inverse_deviation are the forward pass's.
//
// Decomposition: three phases (phases.h): W2, the norm, W1. A weight matrix [rows, columns] is cut into slabs of rows
// by kWarp columns. A block takes such a piece: a lane has a column, a warp every eighth group of four rows, whose
// weights and gradients it holds in registers while the images go by. What is summed over rows leaves a partial result
// a slab, added in order (W2's in the next phase, W1's by the last block of the same columns): no float atomics, the
// same bits every time. Sums over the images are made in two levels (block_of_terms).
//
// Moves: W1, W2 and their gradients once; N * (slabs of C * P + slabs of P * C) partial values, written and read.
#pragma once

#include "split_merge.h"
#include "transform.h"

namespace gc {

// A weight matrix in the backward pass: out = matrix . in. `grad_out` is a function of (image, row); `in` one of the
// column, whose result is a function of the image.
template <typename T, typename In, typename GradOut>
struct Linear {
  Companion matrix;  // [rows, columns]
  int rows, columns;
  int images;
  const In& in;             // [N, columns]
  const GradOut& grad_out;  // [N, rows]
  Acc<T>* partial_in;       // [slabs, N, columns]: this slab's part of matrix^T . grad_out, or null
  CompanionOut grad_matrix;
};

// One slab's piece of kWarp columns. staged: [kSlabImages, slab rows], sums: [warps, kSlabImages, kWarp], totals:
// [slab_totals(kSteps)] in shared memory. Calls ready() before it reads what earlier phases have computed.
template <int kSteps, typename T, typename In, typename GradOut, typename Ready>
GC_DEVICE void slab_backward(const Linear<T, In, GradOut>& linear, int slab, int column0, Acc<T>* staged, Acc<T>* sums,
                             Acc<T>* totals, const Ready& ready) {
  using A = Acc<T>;
  const int thread = port::thread_index();
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  constexpr int kRows = kSteps * kSlabStep;
  const int row0 = slab * kRows;
  const int column = column0 + lane;
  const bool inside = column < linear.columns;
  const bool with_gradient = linear.grad_matrix.data != nullptr;
  const auto in_column = linear.in(inside ? column : 0);

  A weight[kSteps][kSlabRows];
  A grad[kSteps][kSlabRows];  // over a block of images, and in total() over the blocks before
  constexpr bool kSharedTotals = slab_totals(kSteps) > 0;
  A own_total[kSharedTotals ? 1 : kSteps][kSlabRows];
  const auto total = [&](int step, int r) -> A& {
    return kSharedTotals ? totals[(step * kSlabRows + r) * kTransformThreads + thread]
                         : own_total[kSharedTotals ? 0 : step][r];
  };
  GC_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    GC_UNROLL
    for (int r = 0; r < kSlabRows; ++r) {
      const int row = row0 + step * kSlabStep + warp * kSlabRows + r;
      const bool used = row < linear.rows && inside && linear.partial_in != nullptr;
      weight[step][r] = used ? read<T>(linear.matrix, static_cast<long long>(row) * linear.columns + column) : A(0);
      grad[step][r] = 0;
      total(step, r) = 0;
    }
  }
  ready();

  // The next images' values are on their way while those before are multiplied, but for the highest slabs, which leave
  // no registers for that. A thread stages a value a step.
  constexpr bool kAhead = kSteps < kMaxSlabSteps;
  static_assert(kSlabImages * kSlabStep == kTransformThreads, "a value a thread and step");
  A next_in[kSlabImages];
  A next_staged[kSteps];
  const auto fetch = [&](int n0) {
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) {
      next_in[n] = n0 + n < linear.images && inside && with_gradient ? in_column(n0 + n) : A(0);
    }
    GC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int i = step * kTransformThreads + thread;
      const int n = n0 + i / kRows;
      const int row = row0 + i % kRows;
      next_staged[step] = n < linear.images && row < linear.rows ? linear.grad_out(n, row) : A(0);
    }
  };
  const int block = block_of_terms(linear.images, kSlabBlock);
  if (kAhead) fetch(0);
  for (int n0 = 0; n0 < linear.images; n0 += kSlabImages) {
    const int images = linear.images - n0 < kSlabImages ? linear.images - n0 : kSlabImages;
    if (!kAhead) fetch(n0);
    A in[kSlabImages];
    A product[kSlabImages];
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) {
      in[n] = next_in[n];
      product[n] = 0;
    }
    GC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      staged[step * kTransformThreads + thread] = next_staged[step];
    }
    port::sync_block<kSyncSlabStaged>();
    if (kAhead && n0 + kSlabImages < linear.images) fetch(n0 + kSlabImages);
    GC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      GC_UNROLL
      for (int n = 0; n < kSlabImages; ++n) {
        if (n >= images) continue;
        A d[kSlabRows];
        read_shared(d, staged + n * kRows + step * kSlabStep + warp * kSlabRows);
        GC_UNROLL
        for (int r = 0; r < kSlabRows; ++r) {
          product[n] += weight[step][r] * d[r];
          grad[step][r] += in[n] * d[r];
        }
      }
    }
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) sums[(warp * kSlabImages + n) * kWarp + lane] = product[n];
    if (((n0 + kSlabImages) & (block - 1)) == 0) {
      GC_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        GC_UNROLL
        for (int r = 0; r < kSlabRows; ++r) {
          total(step, r) += grad[step][r];
          grad[step][r] = 0;
        }
      }
    }
    port::sync_block<kSyncSlabSums>();
    // A warp an image. The sums are read before the next kSyncSlabStaged and written after it.
    static_assert(kSlabImages == kTransformWarps, "a warp an image");
    if (linear.partial_in == nullptr || warp >= images || !inside) continue;
    A sum = 0;
    GC_UNROLL
    for (int w = 0; w < kTransformWarps; ++w) sum += sums[(w * kSlabImages + warp) * kWarp + lane];
    linear.partial_in[(static_cast<long long>(slab) * linear.images + n0 + warp) * linear.columns + column] = sum;
  }

  if (!with_gradient || !inside) return;
  GC_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    GC_UNROLL
    for (int r = 0; r < kSlabRows; ++r) {
      const int row = row0 + step * kSlabStep + warp * kSlabRows + r;
      if (row >= linear.rows) continue;
      write<T>(linear.grad_matrix, static_cast<long long>(row) * linear.columns + column,
               total(step, r) + grad[step][r]);
    }
  }
}

// Sums over the images, for the slab's rows: out[row] = sum over n of value(n, row), the gradient of a vector that
// every image shares. A thread adds every so many images of a row.
template <typename T, int kSteps>
class ImageSums {
 public:
  // parts: [2 * kTransformThreads] in shared memory, in turn: who writes one again has passed the barrier after which
  // nobody reads it.
  GC_DEVICE ImageSums(int images, Acc<T>* parts) : images_(images), parts_(parts) {}

  template <typename Value>
  GC_DEVICE void write_sums(const CompanionOut& out, int row0, int end_row, const Value& value) {
    if (out.data == nullptr) return;
    const int thread = port::thread_index();
    Acc<T>* const parts = parts_ + turn_ * kTransformThreads;
    turn_ ^= 1;
    const int adders = kTransformThreads / kRows;
    const int row = row0 + thread % kRows;
    Acc<T> sum = 0;
    if (row < end_row) {
      sum = sum_in_blocks<Acc<T>, 8>(thread / kRows, images_, adders, [&](int n) { return value(n, row); });
    }
    parts[thread] = sum;
    port::sync_block<kSyncImageSums>();
    if (thread >= kRows || row >= end_row) return;
    for (int i = 1; i < adders; ++i) sum += parts[thread + i * kRows];
    write<T>(out, row, sum);
  }

 private:
  static constexpr int kRows = kSteps * kSlabStep;
  int images_;
  Acc<T>* parts_;
  int turn_ = 0;
};

// Runs through the phase's pieces of a [rows, columns] matrix: body(slab, first row, end row, first column).
template <int kSteps, typename Body>
GC_DEVICE void for_each_piece(int rows, int columns, int first, int stride, const Body& body) {
  constexpr int kSlab = kSteps * kSlabStep;
  const int slabs = (rows + kSlab - 1) / kSlab;
  const int pieces = slabs * ((columns + kWarp - 1) / kWarp);
  for (int piece = first; piece < pieces; piece += stride) {
    const int row0 = piece % slabs * kSlab;
    body(piece % slabs, row0, row0 + kSlab < rows ? row0 + kSlab : rows, piece / slabs * kWarp);
  }
}

// grad_y (dv above) and grad_hidden of one image of a branch. parts: [kTransformThreads], scratch: [2 * warps] in
// shared memory.
template <typename T>
GC_DEVICE void norm_backward(const TransformBackwardArgs& args, const TransformGradients& branch, int n, int slabs,
                             Acc<T>* parts, Acc<T>* scratch) {
  using A = Acc<T>;
  const int thread = port::thread_index();
  const long long n0 = static_cast<long long>(n) * branch.hidden;
  const A* const normalized = static_cast<const A*>(branch.normalized) + n0;
  const A* const partial_y = static_cast<const A*>(branch.partial_y) + n0;
  A* const grad_y = static_cast<A*>(branch.grad_y) + n0;
  A* const grad_hidden = static_cast<A*>(branch.grad_hidden) + n0;
  const bool with_norm = branch.norm_weight.data != nullptr;
  // As many threads to a hidden unit as there are to spare: each adds a range of slabs.
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
      dy = sum_in_blocks<A, 8>(first_slab, end_slab, 1, [&](int k) {
        return partial_y[static_cast<long long>(k) * args.images * branch.hidden + p];
      });
    }
    if (adders > 1) {  // then the units are all hidden ones: one round
      parts[thread] = dy;
      port::sync_block<kSyncNormParts>();
      for (int other = 1; other < adders; ++other) dy += parts[other * units + thread % units];
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
    scratch[thread / kWarp] = sum;
    scratch[kTransformWarps + thread / kWarp] = product_sum;
  }
  port::sync_block<kSyncNormSums>();
  sum = product_sum = 0;
  GC_UNROLL
  for (int w = 0; w < kTransformWarps; ++w) {
    sum += scratch[w];
    product_sum += scratch[kTransformWarps + w];
  }
  const A mean = sum / static_cast<A>(branch.hidden);
  const A product_mean = product_sum / static_cast<A>(branch.hidden);
  const A inverse_deviation = static_cast<const A*>(branch.inverse_deviation)[n];
  // An infinity in a sum gives NaN to the whole image. PyTorch on a CPU does so too, or leaves some of it infinite.
  const A not_finite = (mean - mean) + (product_mean - product_mean);
  if (thread >= units) return;
  for (int p = thread; p < branch.hidden; p += units) {  // those of which it wrote grad_y
    const A dn = read<T>(branch.norm_weight, p) * grad_y[p];
    grad_hidden[p] = inverse_deviation * (dn - mean - normalized[p] * product_mean) + not_finite;
  }
}

template <typename T, int kSteps>
GC_DEVICE void output_backward(const TransformBackwardArgs& args, const TransformGradients& branch, const Phase& phase,
                               int first, Acc<T>* staged, Acc<T>* sums, Acc<T>* totals,
                               ImageSums<T, kSteps>& image_sums) {
  using A = Acc<T>;
  const auto grad_out = [&](int n, int c) {
    const long long i = static_cast<long long>(n) * args.channels + c;
    const A grad = static_cast<const A*>(branch.grad_out)[i];
    if (branch.gate == Gate::kNone) return grad;
    return gate_backward(branch.gate, grad, static_cast<const A*>(branch.gate_out)[i]);
  };
  const auto y = [&](int p) {
    const bool with_norm = branch.norm_weight.data != nullptr;
    const A weight = with_norm ? read<T>(branch.norm_weight, p) : A(1);
    const A bias = with_norm ? read<T>(branch.norm_bias, p) : A(0);
    const A* const normalized = static_cast<const A*>(branch.normalized) + p;
    return [=, &args, &branch](int n) {
      const A value = normalized[static_cast<long long>(n) * branch.hidden];
      return activate(args.activation, with_norm ? weight * value + bias : value);
    };
  };
  A* const partial = args.grid.phases > 1 ? static_cast<A*>(branch.partial_y) : nullptr;
  const Linear<T, decltype(y), decltype(grad_out)> linear{branch.w2, args.channels, branch.hidden, args.images,
                                                          y,         grad_out,      partial,       branch.grad_w2};
  const auto ready = [] {};  // it reads what earlier launches have computed
  for_each_piece<kSteps>(args.channels, branch.hidden, first, phase.blocks(),
                         [&](int slab, int row0, int end, int column0) {
                           if (partial != nullptr || branch.grad_w2.data != nullptr) {
                             slab_backward<kSteps>(linear, slab, column0, staged, sums, totals, ready);
                           }
                           if (column0 == 0) image_sums.write_sums(branch.grad_b2, row0, end, grad_out);
                         });
}

// Of every branch's slabs of W1, the last block to have finished one of these columns adds up all of them.
template <typename T, int kSteps>
GC_DEVICE void add_context_parts(const TransformBackwardArgs& args, int column0, int* flag) {
  using A = Acc<T>;
  constexpr int kSlab = kSteps * kSlabStep;
  const auto slabs_of = [&](const TransformGradients& branch) { return (branch.hidden + kSlab - 1) / kSlab; };
  const int slabs[2] = {slabs_of(args.branch[0]), args.branches > 1 ? slabs_of(args.branch[1]) : 0};
  if (!arrive_last(args.counters + kPhaseCounters + column0 / kWarp, slabs[0] + slabs[1], flag)) return;
  const long long count = static_cast<long long>(args.images) * args.channels;
  const int column = column0 + port::thread_index() % kWarp;
  if (column >= args.channels) return;
  constexpr int kAtOnce = 4;  // images, a warp each: so many loads in flight
  for (int n0 = port::thread_index() / kWarp; n0 < args.images; n0 += kAtOnce * kTransformWarps) {
    const auto at = [&](int i) { return static_cast<long long>(n0 + i * kTransformWarps) * args.channels + column; };
    A sum[kAtOnce];
    GC_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sum[i] = 0;
    GC_UNROLL
    for (int b = 0; b < 2; ++b) {
      const A* const parts =
          static_cast<const A*>(b == 0 ? args.branch[0].partial_context : args.branch[1].partial_context);
      GC_UNROLL_BY(4)
      for (int k = 0; k < slabs[b]; ++k) {
        GC_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (n0 + i * kTransformWarps < args.images) sum[i] += parts[k * count + at(i)];
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

template <typename T, int kSteps, typename Ready>
GC_DEVICE void input_backward(const TransformBackwardArgs& args, const TransformGradients& branch, const Phase& phase,
                              int first, Acc<T>* staged, Acc<T>* sums, Acc<T>* totals, ImageSums<T, kSteps>& image_sums,
                              int* flag, const Ready& ready) {
  using A = Acc<T>;
  const auto at = [&](const void* values, int n, int p) {
    return static_cast<const A*>(values)[static_cast<long long>(n) * branch.hidden + p];
  };
  const auto grad_hidden = [&](int n, int p) { return at(branch.grad_hidden, n, p); };
  const auto grad_y = [&](int n, int p) { return at(branch.grad_y, n, p); };
  const auto grad_weight = [&](int n, int p) { return grad_y(n, p) * at(branch.normalized, n, p); };
  const auto context = [&](int c) {
    const A* const of_channel = static_cast<const A*>(args.context) + c;
    return [=, &args](int n) { return of_channel[n * args.context_stride]; };
  };
  A* const partial = args.grad_context != nullptr ? static_cast<A*>(branch.partial_context) : nullptr;
  const Linear<T, decltype(context), decltype(grad_hidden)> linear{
      branch.w1, branch.hidden, args.channels, args.images, context, grad_hidden, partial, branch.grad_w1};
  for_each_piece<kSteps>(branch.hidden, args.channels, first, phase.blocks(),
                         [&](int slab, int row0, int end, int column0) {
                           if (partial != nullptr || branch.grad_w1.data != nullptr) {
                             slab_backward<kSteps>(linear, slab, column0, staged, sums, totals, ready);
                           }
                           if (partial != nullptr) add_context_parts<T, kSteps>(args, column0, flag);
                           // The first pieces of a slab take a vector each; where there are fewer, the last takes the
                           // rest.
                           const int piece = column0 / kWarp;
                           const bool is_last = column0 + kWarp >= args.channels;
                           ready();
                           if (piece == 0) image_sums.write_sums(branch.grad_b1, row0, end, grad_hidden);
                           if (piece == 1 || (piece < 1 && is_last)) {
                             image_sums.write_sums(branch.grad_norm_weight, row0, end, grad_weight);
                           }
                           if (piece == 2 || (piece < 2 && is_last)) {
                             image_sums.write_sums(branch.grad_norm_bias, row0, end, grad_y);
                           }
                         });
}

// A block takes slabs of kSteps * kSlabStep rows.
template <typename T, int kSteps>
GC_KERNEL(kTransformThreads, 2)
transform_backward(const TransformBackwardArgs args) {
  using A = Acc<T>;
  constexpr int kSlab = kSteps * kSlabStep;
  port::SharedArena arena;
  int* const ticket = arena.take<int>(1);
  int* const flag = arena.take<int>(1);
  A* const staged = arena.take<A>(kSlabImages * kSlab);
  A* const sums = arena.take<A>(kSlabScratch);
  A* const totals = arena.take<A>(slab_totals(kSteps));
  ImageSums<T, kSteps> image_sums(args.images, sums + kSlabSums);
  if (args.zero.data != nullptr && port::block_x() == 0 && port::thread_index() == 0) write<T>(args.zero, 0, A(0));
  const Phase phase(args.grid, args.counters, ticket);
  // As late as may be: a weight matrix, and the gradient that is given, need not wait for the phase before.
  bool waited = false;
  const auto ready = [&] {
    if (!waited) phase.await_previous();
    waited = true;
  };
  int turn = 0;
  GC_UNROLL_BY(1)
  for (int b = 0; b < args.branches; ++b) {
    const TransformGradients branch = b == 0 ? args.branch[0] : args.branch[1];
    // The branches begin at opposite ends: who has a piece less of one may have one more of the other.
    const int first = b == 0 ? phase.block() : phase.blocks() - 1 - phase.block();
    if (phase.number() == 0) {
      output_backward<T, kSteps>(args, branch, phase, first, staged, sums, totals, image_sums);
    } else if (phase.number() == 1) {
      const int slabs = (args.channels + kSlab - 1) / kSlab;
      ready();
      // Two scratch areas in turn: who writes one again has passed the barrier after which nobody reads it.
      for (int n = first; n < args.images; n += phase.blocks(), ++turn) {
        A* const scratch = sums + turn % 2 * (kTransformThreads + 2 * kTransformWarps);
        norm_backward<T>(args, branch, n, slabs, scratch, scratch + kTransformThreads);
      }
    } else {
      input_backward<T, kSteps>(args, branch, phase, first, staged, sums, totals, image_sums, flag, ready);
    }
  }
  ready();
  phase.finish();
}

}  // namespace gc
