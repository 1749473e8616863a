// The slabs of transform_backward. A weight matrix [rows, columns] is cut into slabs of kSteps * kStepRows rows by
// kWarp columns, of which a block takes one at a time. It holds the slab and its gradient in registers while the images
// go by:
//
//                    lane 0     column0 .. column0 + 31    lane 31
//     row0           +-------------------------------------------+
//                    | warp 0, its rows r = 0 .. 3               |   thread (warp, lane) has, of its column:
//     step 0         | warp 1                                    |     weight[step][r]   the matrix
//                    |  ..                                       |     grad[step][r]     its gradient, a sum over images
//                    | warp 7                                    |
//     row0 + 32      +-------------------------------------------+
//     step 1         | warp 0                                    |
//                    |  ..                                       |
//                    +-------------------------------------------+
//
// For a layer out = matrix . in, and kSlabImages images n at a time:
//
//     staged[n][row]          shared memory: grad_out of the slab's rows. Each thread stages one value a step.
//     in[n]                   register: the layer's input in the lane's column
//     grad[step][r]          += in[n] * staged[n][row]
//     product[n]             += weight[step][r] * staged[n][row]         register: a sum over the warp's rows
//     sums[warp][n][lane]     shared memory: the products of all warps. Warp n adds up those of image n, which gives
//     partial_in[n][column]   memory: this slab's partial result of matrix^T . grad_out
//
// Slabs above each other leave such a partial result each. They are added in order, by whoever needs them: no float
// atomics, the same bits every time. Sums over images are made in two levels (chain_length): grad holds the sum over a
// chain of images, total the sum over the chains before.
#pragma once

#include "transform.h"

namespace gc {

inline constexpr int kSlabImages = 8;  // at a time
inline constexpr int kWarpRows = 4;    // of a warp, in one step
inline constexpr int kStepRows = kWarpRows * kTransformWarps;
inline constexpr int kMaxSlabSteps = 4;
static_assert(kSlabImages * kStepRows == kTransformThreads, "a thread stages one value a step");
static_assert(kSlabImages == kTransformWarps, "a warp adds up the sums of one image");
// The fewest images in a chain of additions.
inline constexpr int kLeastChain = 8 * kSlabImages;

// Slabs above each other, and side by side.
template <typename Int>
GC_BOTH Int slabs_down(Int rows, int steps) {
  return (rows + steps * kStepRows - 1) / (steps * kStepRows);
}
template <typename Int>
GC_BOTH Int slabs_across(Int columns) {
  return (columns + kWarp - 1) / kWarp;
}

// The highest slabs leave no registers for totals, nor for the next images' values while those before are multiplied.
GC_BOTH bool registers_are_full(int steps) { return steps == kMaxSlabSteps; }

template <typename A>
struct SlabShared {
  A* staged;      // [kSlabImages, rows of the slab]
  A* sums;        // [kTransformWarps, kSlabImages, kWarp]
  A* image_sums;  // [2, kTransformThreads], see ImageSums
  A* totals;      // [steps, kWarpRows, kTransformThreads], each thread's own, where registers are full

  template <typename Arena>
  GC_SHARED SlabShared(Arena& arena, int steps)
      : staged(arena.template take<A>(kSlabImages * steps * kStepRows)),
        sums(arena.template take<A>(kTransformWarps * kSlabImages * kWarp)),
        image_sums(arena.template take<A>(2 * kTransformThreads)),
        totals(arena.template take<A>(registers_are_full(steps) ? steps * kWarpRows * kTransformThreads : 0)) {}
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
namespace gc {

struct Slab {
  int down;           // its place among the slabs above each other
  int row0, end_row;  // end_row: of the slab or of the matrix
  int column0;
};

// Slabs are numbered down the columns.
template <int kSteps>
GC_DEVICE Slab slab_at(int number, int rows) {
  constexpr int kRows = kSteps * kStepRows;
  const int down = slabs_down(rows, kSteps);
  Slab slab;
  slab.down = number % down;
  slab.row0 = slab.down * kRows;
  slab.end_row = slab.row0 + kRows < rows ? slab.row0 + kRows : rows;
  slab.column0 = number / down * kWarp;
  return slab;
}

// A layer out = matrix . in, in the backward pass. A layer of transform_backward.h adds to this:
//
//   void await_inputs()         returns when the following can be read
//   A grad_out(n, row)          the gradient of out
//   Column column(c)            the layer's input in this column, of which column(c).of(n) is image n's
template <typename A>
struct Layer {
  // Fetched before the inputs, which would take registers while the many loads of a gradient are added up.
  static constexpr bool kStagedFirst = false;
  int rows, columns, images;
  Companion matrix;          // [rows, columns]
  CompanionOut grad_matrix;  // [rows, columns] out, or null
  A* partial_in;             // [slabs_down, images, columns] out: of matrix^T . grad_out, or null

  GC_DEVICE bool has_work() const { return partial_in != nullptr || grad_matrix.data != nullptr; }
};

template <typename T, int kSteps, typename LayerT>
GC_DEVICE void slab_backward(const LayerT& layer, const Slab& slab, const SlabShared<Acc<T>>& shared) {
  using A = Acc<T>;
  constexpr int kRows = kSteps * kStepRows;
  const int thread = port::thread_index();
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int column = slab.column0 + lane;
  const bool inside = column < layer.columns;
  const bool with_gradient = layer.grad_matrix.data != nullptr;
  const auto input = layer.column(inside ? column : 0);
  const auto row_of = [&](int step, int r) { return slab.row0 + step * kStepRows + warp * kWarpRows + r; };

  A weight[kSteps][kWarpRows];
  A grad[kSteps][kWarpRows];
  constexpr bool kSharedTotals = registers_are_full(kSteps);
  A own_total[kSharedTotals ? 1 : kSteps][kWarpRows];
  const auto total = [&](int step, int r) -> A& {
    return kSharedTotals ? shared.totals[(step * kWarpRows + r) * kTransformThreads + thread]
                         : own_total[kSharedTotals ? 0 : step][r];
  };
  GC_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    GC_UNROLL
    for (int r = 0; r < kWarpRows; ++r) {
      const int row = row_of(step, r);
      const bool used = row < layer.rows && inside && layer.partial_in != nullptr;
      weight[step][r] = used ? read<T>(layer.matrix, static_cast<long long>(row) * layer.columns + column) : A(0);
      grad[step][r] = 0;
      total(step, r) = 0;
    }
  }
  layer.await_inputs();

  // Where there are registers for it, the next images' values are on their way while those before are multiplied.
  constexpr bool kAhead = !registers_are_full(kSteps);
  A next_in[kSlabImages];
  A next_staged[kSteps];
  const auto fetch_in = [&](int n0) {
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) {
      next_in[n] = n0 + n < layer.images && inside && with_gradient ? input.of(n0 + n) : A(0);
    }
  };
  const auto fetch = [&](int n0) {
    if constexpr (!LayerT::kStagedFirst) fetch_in(n0);
    GC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int i = step * kTransformThreads + thread;
      const int n = n0 + i / kRows;
      const int row = slab.row0 + i % kRows;
      next_staged[step] = n < layer.images && row < layer.rows ? layer.grad_out(n, row) : A(0);
    }
    if constexpr (LayerT::kStagedFirst) fetch_in(n0);
  };
  const int chain = chain_length(layer.images, kLeastChain);
  if (kAhead) fetch(0);
  for (int n0 = 0; n0 < layer.images; n0 += kSlabImages) {
    const int images = layer.images - n0 < kSlabImages ? layer.images - n0 : kSlabImages;
    if (!kAhead) fetch(n0);
    A in[kSlabImages];
    A product[kSlabImages];
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) {
      in[n] = next_in[n];
      product[n] = 0;
    }
    GC_UNROLL
    for (int step = 0; step < kSteps; ++step) shared.staged[step * kTransformThreads + thread] = next_staged[step];
    port::sync_block<kSyncSlabStaged>();
    if (kAhead && n0 + kSlabImages < layer.images) fetch(n0 + kSlabImages);

    GC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      GC_UNROLL
      for (int n = 0; n < kSlabImages; ++n) {
        if (n >= images) continue;
        A d[kWarpRows];
        read_shared(d, shared.staged + n * kRows + step * kStepRows + warp * kWarpRows);
        GC_UNROLL
        for (int r = 0; r < kWarpRows; ++r) {
          product[n] += weight[step][r] * d[r];
          grad[step][r] += in[n] * d[r];
        }
      }
    }
    GC_UNROLL
    for (int n = 0; n < kSlabImages; ++n) shared.sums[(warp * kSlabImages + n) * kWarp + lane] = product[n];
    if (((n0 + kSlabImages) & (chain - 1)) == 0) {
      GC_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        GC_UNROLL
        for (int r = 0; r < kWarpRows; ++r) {
          total(step, r) += grad[step][r];
          grad[step][r] = 0;
        }
      }
    }
    port::sync_block<kSyncSlabSums>();
    // The sums are read here and so before the next kSyncSlabStaged; they are written again only after it.
    if (layer.partial_in == nullptr || warp >= images || !inside) continue;
    A sum = 0;
    GC_UNROLL
    for (int w = 0; w < kTransformWarps; ++w) sum += shared.sums[(w * kSlabImages + warp) * kWarp + lane];
    layer.partial_in[(static_cast<long long>(slab.down) * layer.images + n0 + warp) * layer.columns + column] = sum;
  }

  if (!with_gradient || !inside) return;
  GC_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    GC_UNROLL
    for (int r = 0; r < kWarpRows; ++r) {
      const int row = row_of(step, r);
      if (row >= layer.rows) continue;
      write<T>(layer.grad_matrix, static_cast<long long>(row) * layer.columns + column, total(step, r) + grad[step][r]);
    }
  }
}

// Images whose values a thread fetches at once, where a value is one load.
inline constexpr int kImagesAtOnce = 8;

// Sums over the images for the rows of a slab: the gradients of vectors, which every image shares. Several threads take
// the images of a row in turn.
template <typename T, int kSteps>
class ImageSums {
 public:
  // scratch: [2, kTransformThreads] in shared memory. The two areas are used in turn: a thread that writes one again
  // has passed the barrier after which nobody reads it.
  GC_DEVICE ImageSums(int images, Acc<T>* scratch) : images_(images), scratch_(scratch) {}

  // out[row] = sum over n of value(n, row). Nothing happens where out is null.
  template <int kUnroll = kImagesAtOnce, typename Value>
  GC_DEVICE void write_sums(const CompanionOut& out, const Slab& slab, const Value& value) {
    if (out.data == nullptr) return;
    const int thread = port::thread_index();
    Acc<T>* const scratch = scratch_ + turn_ * kTransformThreads;
    turn_ ^= 1;
    constexpr int kRows = kSteps * kStepRows;
    constexpr int kAdders = kTransformThreads / kRows;  // threads to a row
    const int row = slab.row0 + thread % kRows;
    Acc<T> sum = 0;
    if (row < slab.end_row) {
      sum = sum_in_chains<Acc<T>, kImagesAtOnce, kUnroll>(thread / kRows, images_, kAdders,
                                                          [&](int n) { return value(n, row); });
    }
    scratch[thread] = sum;
    port::sync_block<kSyncImageSums>();
    if (thread >= kRows || row >= slab.end_row) return;
    for (int i = 1; i < kAdders; ++i) sum += scratch[thread + i * kRows];
    write<T>(out, row, sum);
  }

 private:
  int images_;
  Acc<T>* scratch_;
  int turn_ = 0;
};

}  // namespace gc
#endif  // GC_DEVICE_CODE
