// The gradients of the residual tail's vectors over the channels, from sums that the launches before have left:
//
//   grad_bias[c]        = sum_n (scale * sums + grad_context)
//   grad_weight[c]      = inverse_std * (sum_n (scale * product_sums + grad_context * context)
//                                        + mask_weight * grad_folded)
//   grad_mask_weight[c] = slope * grad_folded
//
// sums and product_sums are those of residual_sums, context [N, C] is that of y - mean, and grad_folded [C] the gradient
// of slope * mask_weight. A channel's own weight does not divide anything: it may be 0.
//
// With statistics of the batch grad_y needs these gradients, so they are a launch of their own before it. Otherwise
// grad_y's blocks compute them on the way, with the same function and so with the same bits.
//
// Decomposition: a warp takes kNormChannels channels; its lanes share the images. Every lane adds up its own in two
// levels (sum_in_chains), and then the lanes' sums are added in pairs.
//
// Moves: five arrays of [N, C] once, and ten of [C].
#pragma once

#include "tail_backward_args.h"

namespace gc {

inline constexpr int kNormThreads = 256;  // of its own launch
inline constexpr int kNormChannels = 8;   // of a warp: what it reads of an image is 32 bytes

GC_BOTH int norm_units(int channels) { return (channels + kNormChannels - 1) / kNormChannels; }
GC_BOTH int norm_blocks(int channels) {
  return (norm_units(channels) + kNormThreads / kWarp - 1) / (kNormThreads / kWarp);
}

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "transform.h"

namespace gc {

// Those of both gradients, added up together.
template <typename A>
struct NormSums {
  A of_weight, of_bias;

  GC_DEVICE NormSums(A both = 0) : of_weight(both), of_bias(both) {}
  GC_DEVICE NormSums& operator+=(const NormSums& other) {
    of_weight += other.of_weight;
    of_bias += other.of_bias;
    return *this;
  }
};

template <typename T>
GC_DEVICE NormSums<Acc<T>> norm_sums_of(const NormGradientsArgs& args, int n, int c) {
  using A = Acc<T>;
  const long long i = static_cast<long long>(n) * args.channels + c;
  const auto at = [&](const void* array, A absent) { return array ? static_cast<const A*>(array)[i] : absent; };
  const A scale = at(args.scale, A(1));
  const A grad_context = at(args.grad_context, A(0));
  NormSums<A> sums;
  sums.of_bias = scale * at(args.sums, A(0)) + grad_context;
  sums.of_weight = scale * at(args.product_sums, A(0));
  if (args.grad_context != nullptr) {
    sums.of_weight += grad_context * static_cast<const A*>(args.state)[i + (n + 1LL) * kStatistics];
  }
  return sums;
}

// The part of warp `warp` among `warps`, all of whose lanes take part.
template <typename T>
GC_DEVICE void norm_gradients_of(const NormGradientsArgs& args, int warp, int warps) {
  using A = Acc<T>;
  constexpr int kLanes = kWarp / kNormChannels;  // to a channel
  constexpr int kAtOnce = 4;                     // images whose values a lane fetches at once
  const int lane = port::thread_index() % kWarp;
  GC_UNROLL_BY(1)
  for (int unit = warp; unit < norm_units(args.channels); unit += warps) {
    const int c = unit * kNormChannels + lane % kNormChannels;
    NormSums<A> sums;
    if (c < args.channels) {
      sums = sum_in_chains<NormSums<A>, kAtOnce>(lane / kNormChannels, args.images, kLanes,
                                                 [&](int n) { return norm_sums_of<T>(args, n, c); });
    }
    GC_UNROLL
    for (int mask = kNormChannels; mask < kWarp; mask <<= 1) {
      sums.of_bias += port::shuffle_xor(sums.of_bias, mask);
      sums.of_weight += port::shuffle_xor(sums.of_weight, mask);
    }
    if (lane >= kNormChannels || c >= args.channels) continue;
    if (args.grad_folded != nullptr) {
      const A folded = static_cast<const A*>(args.grad_folded)[c];
      sums.of_weight += read<T>(args.mask_weight, c) * folded;
      if (args.grad_mask_weight.data != nullptr) write<T>(args.grad_mask_weight, c, slope_at<T>(args.norm, c) * folded);
    }
    sums.of_weight *= inverse_std_at<T>(args.norm, c);
    if (args.weight_sum != nullptr) static_cast<A*>(args.weight_sum)[c] = sums.of_weight;
    if (args.bias_sum != nullptr) static_cast<A*>(args.bias_sum)[c] = sums.of_bias;
    if (args.grad_weight.data != nullptr) write<T>(args.grad_weight, c, sums.of_weight);
    if (args.grad_bias.data != nullptr) write<T>(args.grad_bias, c, sums.of_bias);
  }
}

template <typename T>
GC_KERNEL(kNormThreads, 1)
norm_gradients(const NormGradientsArgs args) {
  constexpr int kWarps = kNormThreads / kWarp;
  norm_gradients_of<T>(args, port::block_x() * kWarps + port::thread_index() / kWarp, port::grid_x() * kWarps);
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
