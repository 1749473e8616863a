// Pooling over pixels: context[c] = sum_s a[s] * x[c, s], with a = softmax(logits) or uniform, and its backward pass.
//
// Forward, per split: for each tile, the logits (one sum over channels), the running maximum m and sum z, and the sums
// over pixels from the tile that is now in cache, rescaled whenever m grows: x is read from memory once. The splits of
// an image are merged in their order.
//
// Backward, with G the gradient of the context, per tile: a[s] = exp(l[s] - m) / z, dl[s] = a[s] * (G . x[:, s] - G .
// context), then grad_x = a * G + dl * mask_weight (+ grad * scale: what reaches x past the pooling) and
// grad_mask_weight += dl * x. One read of x (and of grad), one write of grad_x.
//
// The dl of an image sum to zero but for rounding. What remains, times the mean of x, would be the largest error of
// grad_mask_weight, so that is summed over x - context instead: the same by definition, and free of it.
//
// An image whose logits are all -inf has z = 0 and becomes NaN by the division, as in PyTorch; +inf and NaN logits do
// so by themselves. No pixel is skipped for a zero weight: 0 * inf stays NaN.
#pragma once

#include <limits>

#include "cpu/vec/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// What to subtract before exp: m, or 0 where nothing but -inf has been seen, so that exp(-inf) gives 0 and not NaN.
template <typename A>
inline A shift_of(A m) {
  return m == -std::numeric_limits<A>::infinity() ? A(0) : m;
}

template <typename A>
inline A max_or_nan(A a, A b) {
  return b > a || b != b ? b : a;
}

template <typename A>
inline A largest(const A* values, int64_t count, A start) {
  using V = Vec<A>;
  V most(start);
  for_each_run<V::size()>(0, count, [&](int64_t j, int n, auto partial) {
    if constexpr (partial.value) {
      for (int i = 0; i < n; ++i) start = max_or_nan(start, values[j + i]);
    } else {
      most = at::vec::maximum(most, V::loadu(values + j));
    }
  });
  A lanes[V::size()];
  most.store(lanes);
  for (const A lane : lanes) start = max_or_nan(start, lane);
  return start;
}

// weights[j] = exp(logits[j] - shift); returns their sum.
template <typename A>
inline A exp_weights(const A* logits, int64_t count, A shift, A* weights) {
  using V = Vec<A>;
  const V minus(shift);
  V sum(A(0));
  for_each_run<V::size()>(0, count, [&](int64_t j, int n, auto partial) {
    if constexpr (partial.value) {
      (V::loadu(logits + j, n) - minus).exp().store(weights + j, n);
      sum = sum + V::loadu(weights + j, n);
    } else {
      const V e = (V::loadu(logits + j) - minus).exp();
      e.store(weights + j);
      sum = sum + e;
    }
  });
  return lane_sum(sum);
}

template <typename A>
inline A sum_of(const A* values, int64_t count) {
  using V = Vec<A>;
  V sum(A(0));
  for_each_run<V::size()>(0, count, [&](int64_t j, int n, auto) { sum = sum + V::loadu(values + j, n); });
  return lane_sum(sum);
}

// state = merge of the image's partials, context = state's context rounded to T.
template <typename T>
inline void merge_image(const PoolArgs<T>& args, int64_t image) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t channels = args.shape.channels;
  const int64_t splits = args.plan.splits;
  const A* partials = args.partials + image * splits * (channels + 2);
  A* state = args.state + image * (channels + 2);

  A m = -std::numeric_limits<A>::infinity();
  for (int64_t k = 0; k < splits; ++k) m = max_or_nan(m, partials[k * (channels + 2)]);
  A factors[kMaxSplits];
  A z = 0;
  for (int64_t k = 0; k < splits; ++k) {
    const A* partial = partials + k * (channels + 2);
    factors[k] = splits == 1 || args.weights == Weights::kUniform ? A(1) : exp_scalar(partial[0] - shift_of(m));
    z += factors[k] * partial[1];
  }
  const V divisor(args.divide_by_z ? z : A(1));
  for_each_run<V::size()>(0, channels, [&](int64_t c, int n, auto) {
    V sum(A(0));
    for (int64_t k = 0; k < splits; ++k) {
      sum = at::vec::fmadd(V::loadu(partials + k * (channels + 2) + 2 + c, n), V(factors[k]), sum);
    }
    (sum / divisor).store(state + 2 + c, n);
  });
  state[0] = m;
  state[1] = z;
  if (!args.context) return;
  for (int64_t c = 0; c < channels; ++c) args.context[image * channels + c] = static_cast<T>(state[2 + c]);
}

template <typename T>
void pool(const PoolArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Shape& shape = args.shape;
  const Plan& plan = args.plan;
  A weights[kMaxTilePixels];
  if (args.weights == Weights::kUniform) {
    for (int64_t p = 0; p < plan.tile; ++p) weights[p] = A(1);
  }
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t image = unit / plan.splits;
    const int64_t split = unit % plan.splits;
    A* partial = args.partials + unit * (shape.channels + 2);
    A* sums = partial + 2;
    A m = args.weights == Weights::kUniform ? A(0) : -std::numeric_limits<A>::infinity();
    A z = 0;
    for (int64_t c = 0; c < shape.channels; ++c) sums[c] = 0;

    const int64_t end = std::min(plan.split_begin(split + 1), shape.pixels);
    for (int64_t pixel = plan.split_begin(split); pixel < end; pixel += plan.tile) {
      const int64_t count = std::min(plan.tile, end - pixel);
      const Tile<T> tile(args.x, shape, image, pixel, count);
      A rescale = 1;
      if (args.weights == Weights::kUniform) {
        z += static_cast<A>(count);
      } else {
        A* logits = args.logits + image * shape.pixels + pixel;
        if (args.weights == Weights::kMask) {
          const V bias(args.mask_bias);
          tile.sum_over_channels(args.mask_weight,
                                 [&](int64_t p, const V& sum, int n) { (sum + bias).store(logits + p, n); });
        }
        const A grown = largest(logits, count, m);
        const A shift = shift_of(grown);
        rescale = exp_scalar(m - shift);
        z = z * rescale + exp_weights(logits, count, shift, weights);
        m = grown;
      }
      const V factor(rescale);
      tile.sum_over_pixels(weights, [&](int64_t c, const V& sum, int n) {
        at::vec::fmadd(V::loadu(sums + c, n), factor, sum).store(sums + c, n);
      });
    }
    partial[0] = m;
    partial[1] = z;
    if (plan.splits == 1) merge_image(args, image);
  }
}

template <typename T>
void pool_merge(const PoolArgs<T>& args, int64_t image_begin, int64_t image_end) {
  for (int64_t image = image_begin; image < image_end; ++image) merge_image(args, image);
}

// Rows of grad_x, each with factors of its own and vectors along it.
template <typename T>
struct GradRows {
  using A = acc_t<T>;
  T* out;
  const T* grad;  // or null
  const T* next;  // what to fetch meanwhile where rows are pixels: the next tile of x, or null
  int64_t stride;
  int64_t rows;
  int64_t width;
  const A* pooled_row;   // [rows]: attention where rows are pixels, the gradient of the context where channels
  const A* pooled_lane;  // [width]: the other one
  const A* mask_row;     // [rows]: gradients of the logits or mask_weight; or null
  const A* mask_lane;    // [width]: the other one
  const A* scale;        // of the channels, or null for 1
};

inline constexpr int64_t kRowsAhead = 4;

// Memory that is read or written in short rows far apart escapes the hardware's prefetching.
template <typename T, int kWrite>
inline void prefetch_row(const T* row, int64_t width) {
  for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + j, kWrite);
}

template <bool kMask, bool kGrad, bool kScale, bool kPixelRows, bool kStream, typename T>
inline void write_grad_rows(const GradRows<T>& job) {
  using L = Lanes<T>;
  using V = typename L::V;
  const acc_t<T>* const pooled_lane = job.pooled_lane;
  const acc_t<T>* const mask_lane = job.mask_lane;
  const acc_t<T>* const scale = job.scale;
  for (int64_t r = 0; r < job.rows; ++r) {
    const V pooled_row(job.pooled_row[r]);
    const V mask_row(kMask ? job.mask_row[r] : acc_t<T>(0));
    const V row_scale(kScale && !kPixelRows ? scale[r] : acc_t<T>(1));
    T* const out = job.out + r * job.stride;
    const T* const grad = kGrad ? job.grad + r * job.stride : nullptr;
    if constexpr (kPixelRows) {
      if (job.next) prefetch_row<T, 0>(job.next + r * job.stride, job.width);
    } else {
      if (r + kRowsAhead < job.rows) {
        if constexpr (!kStream) prefetch_row<T, 1>(out + kRowsAhead * job.stride, job.width);
        if constexpr (kGrad) prefetch_row<T, 0>(grad + kRowsAhead * job.stride, job.width);
      }
    }
    const auto write_run = [=](int64_t j, int count, auto partial) {
      L lanes = L::template load_wide<partial.value>(pooled_lane + j, count);
      GC_UNROLL
      for (int i = 0; i < L::kVecs; ++i) lanes.v[i] = lanes.v[i] * pooled_row;
      if constexpr (kMask) lanes.add_product(L::template load_wide<partial.value>(mask_lane + j, count), mask_row);
      if constexpr (kGrad) {
        const L g = L::template load<partial.value>(grad + j, count);
        if constexpr (!kScale) {
          lanes.add(g);
        } else if constexpr (kPixelRows) {
          lanes.add_product(g, L::template load_wide<partial.value>(scale + j, count));
        } else {
          lanes.add_product(g, row_scale);
        }
      }
      lanes.template store<partial.value, kStream>(out + j, count);
    };
    const int64_t head = kStream ? until_aligned(out, job.width) : 0;
    if (head > 0) write_run(0, static_cast<int>(head), std::true_type{});
    for_each_run<L::kWidth>(head, job.width, write_run);
  }
}

// One tile of grad_x.
template <typename T>
inline void write_grad_x(const PoolBackwardArgs<T>& args, int64_t image, int64_t pixel, int64_t count,
                         const acc_t<T>* attention, const acc_t<T>* grad_logits) {
  const Shape& shape = args.shape;
  const int64_t channels = shape.channels;
  const int64_t offset = Tile<T>::offset(shape, image, pixel);
  const acc_t<T>* grad_context = args.grad_context + image * channels;
  GradRows<T> job;
  job.out = args.grad_x + offset;
  job.grad = args.grad ? args.grad + offset : nullptr;
  const bool last = pixel + 2 * count > shape.pixels;
  job.next = shape.channels_last && !last ? args.x + Tile<T>::offset(shape, image, pixel + count) : nullptr;
  job.scale = args.scale ? args.scale + image * channels : nullptr;
  if (shape.channels_last) {
    job.stride = job.width = channels;
    job.rows = count;
    job.pooled_row = attention;
    job.pooled_lane = grad_context;
    job.mask_row = grad_logits;
    job.mask_lane = args.mask_weight;
  } else {
    job.stride = shape.pixels;
    job.rows = channels;
    job.width = count;
    job.pooled_row = grad_context;
    job.pooled_lane = attention;
    job.mask_row = args.mask_weight;
    job.mask_lane = grad_logits;
  }
  const auto write = [&](auto mask, auto grad, auto scale) {
    const auto write_rows = [&](auto pixel_rows, auto stream) {
      write_grad_rows<mask, grad, scale, pixel_rows, stream>(job);
    };
    if (args.stream && grad) {
      shape.channels_last ? write_rows(std::true_type{}, std::true_type{})
                          : write_rows(std::false_type{}, std::true_type{});
    } else {
      shape.channels_last ? write_rows(std::true_type{}, std::false_type{})
                          : write_rows(std::false_type{}, std::false_type{});
    }
  };
  if (!args.mask_weight) {  // softmax_pool: without a grad
    write(std::false_type{}, std::false_type{}, std::false_type{});
  } else if (!job.grad) {
    write(std::true_type{}, std::false_type{}, std::false_type{});
  } else if (!job.scale) {
    write(std::true_type{}, std::true_type{}, std::false_type{});
  } else {
    write(std::true_type{}, std::true_type{}, std::true_type{});
  }
}

template <typename T>
void pool_backward(const PoolBackwardArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Shape& shape = args.shape;
  const Plan& plan = args.plan;
  const int64_t channels = shape.channels;
  A attention[kMaxTilePixels];
  A grad_logits[kMaxTilePixels];
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t image = unit / plan.splits;
    const int64_t split = unit % plan.splits;
    const A* state = args.state + image * (channels + 2);
    const A* grad_context = args.grad_context + image * channels;
    A* grad_weight = args.grad_mask_weight ? args.grad_mask_weight + unit * channels : nullptr;
    if (grad_weight) {
      for (int64_t c = 0; c < channels; ++c) grad_weight[c] = 0;
    }
    V products;
    dot_rows<1, 1>(state + 2, 0, channels, grad_context, 0, &products, 0);
    const V mean(lane_sum(products));
    const V z(state[1]);
    A grad_logits_sum = 0;

    const int64_t end = std::min(plan.split_begin(split + 1), shape.pixels);
    for (int64_t pixel = plan.split_begin(split); pixel < end; pixel += plan.tile) {
      const int64_t count = std::min(plan.tile, end - pixel);
      const Tile<T> tile(args.x, shape, image, pixel, count);
      exp_weights(args.logits + image * shape.pixels + pixel, count, state[0], attention);
      tile.sum_over_channels(grad_context, [&](int64_t p, const V& sum, int n) {
        const V a = V::loadu(attention + p, n) / z;
        a.store(attention + p, n);
        (a * (sum - mean)).store(grad_logits + p, n);
      });
      if (args.grad_logits) {
        A* out = args.grad_logits + image * shape.pixels + pixel;
        for (int64_t p = 0; p < count; ++p) out[p] = grad_logits[p];
      }
      if (grad_weight) {
        grad_logits_sum += sum_of(grad_logits, count);
        tile.sum_over_pixels(grad_logits, [&](int64_t c, const V& sum, int n) {
          (V::loadu(grad_weight + c, n) + sum).store(grad_weight + c, n);
        });
      }
      if (args.grad_x) write_grad_x(args, image, pixel, count, attention, grad_logits);
    }
    if (grad_weight) {
      for (int64_t c = 0; c < channels; ++c) grad_weight[c] -= grad_logits_sum * state[2 + c];
    }
  }
  if (args.stream) stream_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
