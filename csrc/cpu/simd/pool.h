// Pooling over pixels, and its backward pass. Forward, with a = softmax(logits), a = 1 for the sum or a = 1 / S for the
// mean:
//
//   context[c] = sum_s a[s] * x[c, s]
//
// For each tile of a split: the logits (one sum over channels), the largest logit m so far and the sum z, and the sums
// over the pixels of the tile, which is in cache now. They are rescaled whenever m grows, so x is read from memory
// once. The splits of an image are merged in their order.
//
// Backward, with G the gradient of the context:
//
//   a[s]                = exp(l[s] - m) / z
//   dl[s]               = a[s] * (G . (x[:, s] - context))
//   grad_mask_weight[c] = sum_s dl[s] * x[c, s]
//
// This too reads x once. grad_x comes after it and does not need x (grad_x.h).
//
// A pixel that has all the weight is the context, and its dl is an exact 0, as G . (x - context) is one sum (tile.h).
// As the difference of two large numbers, G . x and G . context, it would leave their rounding, and grad_x would have
// that times mask_weight.
//
// The dl of an image add up to zero but for the rounding of the context, which adds a[s] * G . (error of the context)
// to each. Their sum shows how large that is, and is taken out of each dl in proportion to a. In grad_mask_weight, what
// remains of that sum times the mean of x would be the largest error. So it is summed over x - context, which is the
// same by definition and free of that error.
//
// With a mean, both are of x - mean in place of x (tile.h), and the context is one of x - mean.
//
// An image whose logits are all -inf has z = 0 and becomes NaN by the division, as in PyTorch; with logits of +inf or
// NaN it becomes NaN by itself. No pixel is skipped for a zero weight: 0 * inf stays NaN.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/cascade.h"
#include "cpu/simd/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// What to subtract from the logits before exp: m, or 0 where all of them were -inf, so that exp gives 0 and not NaN.
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
  for_each_vector<V::size()>(0, count, [&](int64_t j, int n, auto partial) {
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
  for_each_vector<V::size()>(0, count, [&](int64_t j, int n, auto partial) {
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
  for_each_vector<V::size()>(0, count, [&](int64_t j, int n, auto) { sum = sum + V::loadu(values + j, n); });
  return lane_sum(sum);
}

// Merges the image's partial results into its state; context is that of the state, rounded to T.
template <typename T>
inline void merge_image(const PoolArgs<T>& args, int64_t image) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t channels = args.shape.channels;
  const int64_t splits = args.plan.splits;
  const A* partials = args.partials + image * splits * (channels + kStatistics);
  A* state = args.state + image * (channels + kStatistics);

  A m = -std::numeric_limits<A>::infinity();
  for (int64_t k = 0; k < splits; ++k) m = max_or_nan(m, partials[k * (channels + kStatistics)]);
  A factors[kMaxSplits];
  A z = 0;
  for (int64_t k = 0; k < splits; ++k) {
    const A* partial = partials + k * (channels + kStatistics);
    factors[k] = splits == 1 || args.weighting == Weighting::kUniform ? A(1) : exp_scalar(partial[0] - shift_of(m));
    z += factors[k] * partial[1];
  }
  const V divisor(args.divide_by_z ? z : A(1));
  for_each_vector<V::size()>(0, channels, [&](int64_t c, int n, auto) {
    V sum(A(0));
    for (int64_t k = 0; k < splits; ++k) {
      sum = at::vec::fmadd(V::loadu(partials + k * (channels + kStatistics) + kStatistics + c, n), V(factors[k]), sum);
    }
    (sum / divisor).store(state + kStatistics + c, n);
  });
  state[0] = m;
  state[1] = z;
  if (!args.context) return;
  for (int64_t c = 0; c < channels; ++c) args.context[image * channels + c] = static_cast<T>(state[kStatistics + c]);
}

template <bool kLessMean, typename T>
inline void pool_splits(const PoolArgs<T>& args, int64_t split_begin, int64_t split_end) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Shape& shape = args.shape;
  const Plan& plan = args.plan;
  A weights[kMaxTilePixels];
  Sums<A> z_and_sums(1 + shape.channels);
  if (args.weighting == Weighting::kUniform) {
    for (int64_t p = 0; p < plan.tile; ++p) weights[p] = A(1);
  }
  for (int64_t split = split_begin; split < split_end; ++split) {
    const auto [image, begin, end] = split_at(shape, plan, split);
    const A* const mean = kLessMean ? args.mean + image * args.mean_stride : nullptr;
    A* partial = args.partials + split * (shape.channels + kStatistics);
    A& z = partial[1];
    A* sums = partial + kStatistics;
    A m = args.weighting == Weighting::kUniform ? A(0) : -std::numeric_limits<A>::infinity();
    z_and_sums.start(partial + 1);

    for (int64_t pixel = begin; pixel < end; pixel += plan.tile) {
      const int64_t count = std::min(plan.tile, end - pixel);
      const Tile<T, kLessMean> tile(args.x, mean, shape, image, pixel, count);
      if (args.weighting == Weighting::kUniform) {
        z += static_cast<A>(count);
      } else {
        A* logits = args.logits + image * shape.pixels + pixel;
        if (args.weighting == Weighting::kMask) {
          const V bias(args.mask_bias);
          tile.sum_over_channels(args.mask_weight,
                                 [&](int64_t p, const V& sum, int n) { (sum + bias).store(logits + p, n); });
        }
        const A grown = largest(logits, count, m);
        const A shift = shift_of(grown);
        const A rescale = exp_scalar(m - shift);
        if (rescale != A(1)) z_and_sums.scale(rescale);
        z += exp_weights(logits, count, shift, weights);
        m = grown;
      }
      tile.sum_over_pixels(weights,
                           [&](int64_t c, const V& sum, int n) { (V::loadu(sums + c, n) + sum).store(sums + c, n); });
      z_and_sums.added();
    }
    z_and_sums.finish();
    partial[0] = m;
    if (plan.splits == 1) merge_image(args, image);
  }
}

template <typename T>
void pool(const PoolArgs<T>& args, int64_t split_begin, int64_t split_end) {
  if (args.mean) {
    pool_splits<true>(args, split_begin, split_end);
  } else {
    pool_splits<false>(args, split_begin, split_end);
  }
}

template <typename T>
void pool_merge(const PoolArgs<T>& args, int64_t image_begin, int64_t image_end) {
  for (int64_t image = image_begin; image < image_end; ++image) merge_image(args, image);
}

// grad_logits -= attention * (the sum of the image's grad_logits), in the pixels of a split. A sum that is infinite or
// NaN is not taken out.
template <typename T>
void pool_backward_balance(const PoolBackwardArgs<T>& args, int64_t split_begin, int64_t split_end) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Plan& plan = args.plan;
  for (int64_t split = split_begin; split < split_end; ++split) {
    const auto [image, begin, end] = split_at(args.shape, plan, split);
    A excess = 0;
    for (int64_t k = 0; k < plan.splits; ++k) excess += args.grad_logits_sums[image * plan.splits + k];
    if (excess == A(0) || !std::isfinite(excess)) continue;
    const A* attention = args.attention + image * args.shape.pixels;
    A* grad_logits = args.grad_logits + image * args.shape.pixels;
    const V factor(-excess);
    for_each_vector<V::size()>(begin, end, [&](int64_t p, int n, auto) {
      const V balanced = at::vec::fmadd(V::loadu(attention + p, n), factor, V::loadu(grad_logits + p, n));
      balanced.store(grad_logits + p, n);
    });
  }
}

template <bool kLessMean, typename T>
inline void pool_backward_splits(const PoolBackwardArgs<T>& args, int64_t split_begin, int64_t split_end) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Shape& shape = args.shape;
  const Plan& plan = args.plan;
  const int64_t channels = shape.channels;
  Sums<A> weight_sums(channels);
  for (int64_t split = split_begin; split < split_end; ++split) {
    const auto [image, begin, end] = split_at(shape, plan, split);
    const A* state = args.state + image * (channels + kStatistics);
    const A* context = state + kStatistics;
    const A* grad_context = args.grad_context + image * channels;
    A* grad_weight = args.grad_mask_weight ? args.grad_mask_weight + split * channels : nullptr;
    if (grad_weight) weight_sums.start(grad_weight);
    const V z(state[1]);
    Cascade<A> grad_logits_sum;

    for (int64_t pixel = begin; pixel < end; pixel += plan.tile) {
      const int64_t count = std::min(plan.tile, end - pixel);
      const Tile<T, kLessMean> tile(args.x, args.mean, shape, image, pixel, count);
      A* attention = args.attention + image * shape.pixels + pixel;
      A* grad_logits = args.grad_logits + image * shape.pixels + pixel;
      exp_weights(args.logits + image * shape.pixels + pixel, count, state[0], attention);
      tile.sum_over_channels(grad_context, context, [&](int64_t p, const V& sum, int n) {
        const V a = V::loadu(attention + p, n) / z;
        a.store(attention + p, n);
        (a * sum).store(grad_logits + p, n);
      });
      grad_logits_sum.add(sum_of(grad_logits, count));
      if (grad_weight) {
        tile.sum_over_pixels(grad_logits, [&](int64_t c, const V& sum, int n) {
          (V::loadu(grad_weight + c, n) + sum).store(grad_weight + c, n);
        });
        weight_sums.added();
      }
    }
    args.grad_logits_sums[split] = grad_logits_sum.total();
    if (grad_weight) {
      weight_sums.finish();
      for (int64_t c = 0; c < channels; ++c) grad_weight[c] -= args.grad_logits_sums[split] * context[c];
    }
    if (plan.splits == 1) pool_backward_balance(args, split, split + 1);
  }
}

template <typename T>
void pool_backward(const PoolBackwardArgs<T>& args, int64_t split_begin, int64_t split_end) {
  if (args.mean) {
    pool_backward_splits<true>(args, split_begin, split_end);
  } else {
    pool_backward_splits<false>(args, split_begin, split_end);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
