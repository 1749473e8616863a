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
// Decomposition: four phases (phases.h): W2, the norm, W1, grad_context. A weight matrix [rows, columns] is cut into
// slabs of rows by kWarp columns. A block takes such a piece: a lane has a column, a warp every eighth group of four
// rows, whose weights and gradients it holds in registers while the images go by. What is summed over rows leaves a
// partial result a slab, added in order in the next phase: no float atomics, the same bits every time.
//
// Moves: W1, W2 and their gradients once; N * (slabs of C * P + slabs of P * C) partial values, written and read.
#pragma once

#include "transform.h"

namespace gc {

// A weight matrix in the backward pass: out = matrix . in. `in` and `grad_out` are functions of (image, index).
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

// One slab's piece of kWarp columns. staged: [kSlabImages, slab rows], sums: [warps, kSlabImages, kWarp] in shared
// memory.
template <typename T, typename In, typename GradOut>
GC_DEVICE void slab_backward(const Linear<T, In, GradOut>& linear, int slab, int column0, int steps, Acc<T>* staged,
                             Acc<T>* sums) {
  using A = Acc<T>;
  const int thread = port::thread_index();
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int slab_rows = steps * kSlabStep;
  const int row0 = slab * slab_rows;
  const int column = column0 + lane;
  const bool inside = column < linear.columns;
  const bool with_gradient = linear.grad_matrix.data != nullptr;

  A weight[kMaxSlabSteps][kSlabRows];
  A grad[kMaxSlabSteps][kSlabRows];
  GC_UNROLL
  for (int step = 0; step < kMaxSlabSteps; ++step) {
    GC_UNROLL
    for (int r = 0; r < kSlabRows; ++r) {
      const int row = row0 + step * kSlabStep + warp * kSlabRows + r;
      const bool used = step < steps && row < linear.rows && inside && linear.partial_in != nullptr;
      weight[step][r] = used ? read<T>(linear.matrix, static_cast<long long>(row) * linear.columns + column) : A(0);
      grad[step][r] = 0;
    }
  }

  for (int n0 = 0; n0 < linear.images; n0 += kSlabImages) {
    const int images = linear.images - n0 < kSlabImages ? linear.images - n0 : kSlabImages;
    for (int i = thread; i < images * slab_rows; i += kTransformThreads) {
      const int row = row0 + i % slab_rows;
      staged[i] = row < linear.rows ? linear.grad_out(n0 + i / slab_rows, row) : A(0);
    }
    A in[kSlabImages];
    A product[kSlabImages];
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) {
      in[n] = n < images && inside && with_gradient ? linear.in(n0 + n, column) : A(0);
      product[n] = 0;
    }
    port::sync_block<kSyncSlabStaged>();
    GC_UNROLL
    for (int step = 0; step < kMaxSlabSteps; ++step) {
      if (step >= steps) continue;
      GC_UNROLL
      for (int n = 0; n < kSlabImages; ++n) {
        if (n >= images) continue;
        A d[kSlabRows];
        read_shared(d, staged + n * slab_rows + step * kSlabStep + warp * kSlabRows);
        GC_UNROLL
        for (int r = 0; r < kSlabRows; ++r) {
          product[n] += weight[step][r] * d[r];
          grad[step][r] += in[n] * d[r];
        }
      }
    }
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) sums[(warp * kSlabImages + n) * kWarp + lane] = product[n];
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
  for (int step = 0; step < kMaxSlabSteps; ++step) {
    GC_UNROLL
    for (int r = 0; r < kSlabRows; ++r) {
      const int row = row0 + step * kSlabStep + warp * kSlabRows + r;
      if (step >= steps || row >= linear.rows) continue;
      write<T>(linear.grad_matrix, static_cast<long long>(row) * linear.columns + column, grad[step][r]);
    }
  }
}

// out[row] = sum over the images of value(n, row), for the slab's rows: the gradient of a vector that every image
// shares.
template <typename T, typename Value>
GC_DEVICE void sum_images(const CompanionOut& out, int images, int row0, int rows, const Value& value) {
  if (out.data == nullptr) return;
  for (int row = row0 + port::thread_index(); row < rows; row += kTransformThreads) {
    Acc<T> sum = 0;
    for (int n = 0; n < images; ++n) sum += value(n, row);
    write<T>(out, row, sum);
  }
}

// Runs through the phase's pieces of a [rows, columns] matrix: body(slab, first row, end row, first column).
template <typename Body>
GC_DEVICE void for_each_piece(int steps, int rows, int columns, int first, int stride, const Body& body) {
  const int slab_rows = steps * kSlabStep;
  const int slabs = (rows + slab_rows - 1) / slab_rows;
  const int pieces = slabs * ((columns + kWarp - 1) / kWarp);
  for (int piece = first; piece < pieces; piece += stride) {
    const int row0 = piece % slabs * slab_rows;
    body(piece % slabs, row0, row0 + slab_rows < rows ? row0 + slab_rows : rows, piece / slabs * kWarp);
  }
}

// grad_y (dv above) and grad_hidden of one image of a branch.
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
  const bool with_norm = branch.norm_weight.data != nullptr;
  A sum = 0;          // of dn
  A product_sum = 0;  // of dn * normalized
  for (int p = thread; p < branch.hidden; p += kTransformThreads) {
    A dy = 0;
    GC_UNROLL_BY(4)
    for (int k = 0; k < slabs; ++k) dy += partial_y[static_cast<long long>(k) * args.images * branch.hidden + p];
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
  for (int p = thread; p < branch.hidden; p += kTransformThreads) {
    const A dn = read<T>(branch.norm_weight, p) * grad_y[p];
    grad_hidden[p] = inverse_deviation * (dn - mean - normalized[p] * product_mean);
  }
}

template <typename T>
GC_DEVICE void output_backward(const TransformBackwardArgs& args, const TransformGradients& branch, const Phase& phase,
                               int first, Acc<T>* staged, Acc<T>* sums) {
  using A = Acc<T>;
  const auto grad_out = [&](int n, int c) {
    const long long i = static_cast<long long>(n) * args.channels + c;
    const A grad = static_cast<const A*>(branch.grad_out)[i];
    if (branch.gate == Gate::kNone) return grad;
    return gate_backward(branch.gate, grad, static_cast<const A*>(branch.gate_out)[i]);
  };
  const auto y = [&](int n, int p) {
    const A normalized = static_cast<const A*>(branch.normalized)[static_cast<long long>(n) * branch.hidden + p];
    return activate(args.activation, before_activation<T>(branch, normalized, p));
  };
  A* const partial = args.grid.phases > 1 ? static_cast<A*>(branch.partial_y) : nullptr;
  const Linear<T, decltype(y), decltype(grad_out)> linear{branch.w2, args.channels, branch.hidden, args.images,
                                                          y,         grad_out,      partial,       branch.grad_w2};
  for_each_piece(args.slab_steps, args.channels, branch.hidden, first, phase.blocks(),
                 [&](int slab, int row0, int end, int column0) {
                   if (partial != nullptr || branch.grad_w2.data != nullptr) {
                     slab_backward(linear, slab, column0, args.slab_steps, staged, sums);
                   }
                   if (column0 == 0) sum_images<T>(branch.grad_b2, args.images, row0, end, grad_out);
                 });
}

template <typename T>
GC_DEVICE void input_backward(const TransformBackwardArgs& args, const TransformGradients& branch, const Phase& phase,
                              int first, Acc<T>* staged, Acc<T>* sums) {
  using A = Acc<T>;
  const auto at = [&](const void* values, int n, int p) {
    return static_cast<const A*>(values)[static_cast<long long>(n) * branch.hidden + p];
  };
  const auto grad_hidden = [&](int n, int p) { return at(branch.grad_hidden, n, p); };
  const auto grad_y = [&](int n, int p) { return at(branch.grad_y, n, p); };
  const auto grad_weight = [&](int n, int p) { return grad_y(n, p) * at(branch.normalized, n, p); };
  const auto context = [&](int n, int c) { return static_cast<const A*>(args.context)[n * args.context_stride + c]; };
  A* const partial = args.grad_context != nullptr ? static_cast<A*>(branch.partial_context) : nullptr;
  const Linear<T, decltype(context), decltype(grad_hidden)> linear{
      branch.w1, branch.hidden, args.channels, args.images, context, grad_hidden, partial, branch.grad_w1};
  for_each_piece(args.slab_steps, branch.hidden, args.channels, first, phase.blocks(),
                 [&](int slab, int row0, int end, int column0) {
                   if (partial != nullptr || branch.grad_w1.data != nullptr) {
                     slab_backward(linear, slab, column0, args.slab_steps, staged, sums);
                   }
                   if (column0 != 0) return;
                   sum_images<T>(branch.grad_b1, args.images, row0, end, grad_hidden);
                   sum_images<T>(branch.grad_norm_weight, args.images, row0, end, grad_weight);
                   sum_images<T>(branch.grad_norm_bias, args.images, row0, end, grad_y);
                 });
}

template <typename T>
GC_DEVICE void add_context_parts(const TransformBackwardArgs& args, const Phase& phase) {
  using A = Acc<T>;
  const long long count = static_cast<long long>(args.images) * args.channels;
  const int slab_rows = args.slab_steps * kSlabStep;
  for (long long i = static_cast<long long>(phase.block()) * kTransformThreads + port::thread_index(); i < count;
       i += static_cast<long long>(phase.blocks()) * kTransformThreads) {
    A sum = 0;
    GC_UNROLL
    for (int b = 0; b < 2; ++b) {
      if (b >= args.branches) continue;
      const int slabs = (args.branch[b].hidden + slab_rows - 1) / slab_rows;
      const A* const parts = static_cast<const A*>(args.branch[b].partial_context);
      GC_UNROLL_BY(4)
      for (int k = 0; k < slabs; ++k) sum += parts[k * count + i];
    }
    static_cast<A*>(args.grad_context)[i] = static_cast<A>(args.factor) * sum;
  }
}

template <typename T>
GC_KERNEL(kTransformThreads, 2)
transform_backward(const TransformBackwardArgs args) {
  using A = Acc<T>;
  const int slab_rows = args.slab_steps * kSlabStep;
  port::SharedArena arena;
  int* const ticket = arena.take<int>(1);
  A* const staged = arena.take<A>(kSlabImages * slab_rows);
  A* const sums = arena.take<A>(kTransformWarps * kSlabImages * kWarp);
  const Phase phase(args.grid, args.counters, ticket);
  phase.await_previous();
  if (phase.number() == 3) {
    add_context_parts<T>(args, phase);
  } else {
    int turn = 0;
    GC_UNROLL_BY(1)
    for (int b = 0; b < args.branches; ++b) {
      const TransformGradients branch = b == 0 ? args.branch[0] : args.branch[1];
      // The branches begin at opposite ends: who has a piece less of one may have one more of the other.
      const int first = b == 0 ? phase.block() : phase.blocks() - 1 - phase.block();
      if (phase.number() == 0) {
        output_backward<T>(args, branch, phase, first, staged, sums);
      } else if (phase.number() == 1) {
        const int slabs = (args.channels + slab_rows - 1) / slab_rows;
        // Two scratch areas in turn: who writes one again has passed the barrier after which nobody reads it.
        for (int n = first; n < args.images; n += phase.blocks(), ++turn) {
          norm_backward<T>(args, branch, n, slabs, sums + turn % 2 * 2 * kTransformWarps);
        }
      } else {
        input_backward<T>(args, branch, phase, first, staged, sums);
      }
    }
  }
  phase.finish();
}

}  // namespace gc
