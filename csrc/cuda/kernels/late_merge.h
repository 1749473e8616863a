// Pooling in two launches: pool_forward leaves the partial results of its splits, and the first phase of the transform
// after it merges them. With m_k, z_k, sums_k of split k and K splits to an image,
//
//   m = max_k m_k,   z = sum_k exp(m_k - m) * z_k,   context = sum_k exp(m_k - m) * sums_k / z
//
// or without a softmax, context = factor * sum_k sums_k. All of it goes to the state.
//
// In pool_forward the last blocks to arrive merge, in two rounds, while the others are gone. Here every block of the
// launch can have a part, and there is only one round.
//
// Decomposition: a block takes slices of kWarp channels of an image, one after the other. Its warps share the splits:
// warp w adds up those from w * each on, each lane for one channel, in units of exp(m_w) with m_w the largest of these
// m_k. The first warp then merges the warps' sums. So the order of the additions is that of the splits, whatever the
// order of arrival.
//
// Moves: the partial results once, the statistics among them once for each slice, and the state.
//
// The gradient's sums over pixels have no softmax, and few splits: there are more chunks of channels, without whole
// pixels to hold. So in the backward pass the merge is no phase, with blocks that wait for its end. Where the
// transform's first phase reads a gradient, it adds up that of the splits (sum_of_splits), as often as it reads: once
// for each kWarp hidden units, and for the bias.
#pragma once

#include "traits.h"
#include "transform.h"

namespace gc {

static_assert(kMostLateSplits == kTransformWarps * kWarp, "every lane has one to fetch the statistics of");

// The splits' gradients are added up in such groups, of which there are no more.
inline constexpr int kGathered = KernelTraits::kMergedAtOnce;
static_assert(kMostGatheredSplits <= kGathered * kGathered, "of more, two rounds have larger groups");

GC_BOTH int merge_slices(int channels) { return (channels + kWarp - 1) / kWarp; }  // of an image

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "softmax.h"

namespace gc {

// Of each of the warps.
template <typename A>
struct MergeShares {
  A* sums;   // [kTransformWarps, kWarp]
  A* stats;  // [kTransformWarps, 2]
};

// A warp's share of an image's splits, of which each lane adds up its channel; a channel past the last counts as 0.
template <typename A>
GC_DEVICE void merge_share(const PartialContext& partial, int channels, int n, int channel, const MergeShares<A>& to) {
  constexpr int kAtOnce = 4;  // are added to each other first: errors grow with the length of a chain of additions
  const int lane = port::thread_index() % kWarp;
  const int warp = port::thread_index() / kWarp;
  const int each = (partial.splits + kTransformWarps - 1) / kTransformWarps;
  const int first = warp * each;
  const int own = first + each < partial.splits ? each : partial.splits - first;  // none, or less, in the last warps

  A m = minus_infinity<A>();
  A z = 0;
  if (partial.stats != nullptr && lane < own) {
    const A* const stats = static_cast<const A*>(partial.stats) + n * partial.stats_stride + 2 * (first + lane);
    m = stats[0];
    z = stats[1];
  }
  // All loads are in flight before the first is used.
  A value[kWarp];
  const A* const sums =
      static_cast<const A*>(partial.sums) + (static_cast<long long>(n) * partial.splits + first) * channels + channel;
  GC_UNROLL
  for (int k = 0; k < kWarp; ++k) {
    value[k] = k < own && channel < channels ? sums[static_cast<long long>(k) * channels] : A(0);
  }

  A weight = lane < own ? A(1) : A(0);  // of the split whose statistics the lane has
  if (partial.stats != nullptr) {
    A most = m;
    GC_UNROLL
    for (int mask = 1; mask < kWarp; mask <<= 1) most = Max::combine(most, port::shuffle_xor(most, mask));
    weight = lane < own ? exp_below(m, most) : A(0);
    m = most;
    z = warp_sum(weight * z);
  }
  A sum = 0;
  GC_UNROLL
  for (int k = 0; k < kWarp; k += kAtOnce) {
    if (k >= own) break;
    A together = 0;
    GC_UNROLL
    for (int i = 0; i < kAtOnce; ++i) together += port::shuffle(weight, k + i) * value[k + i];
    sum += together;
  }
  to.sums[port::thread_index()] = sum;
  if (lane == 0) {
    to.stats[2 * warp] = m;
    to.stats[2 * warp + 1] = z;
  }
}

// The sum of the warps' values, first of pairs, then of pairs of pairs.
template <typename A>
GC_DEVICE A sum_of_warps(A (&value)[kTransformWarps]) {
  GC_UNROLL
  for (int half = kTransformWarps / 2; half > 0; half /= 2) {
    GC_UNROLL
    for (int w = 0; w < half; ++w) value[w] += value[w + half];
  }
  return value[0];
}

// The state of the lane's channel.
template <typename A>
GC_DEVICE void merge_shares(const PartialContext& partial, int channels, int n, int channel,
                            const MergeShares<A>& from) {
  const int lane = port::thread_index();
  A* const state = static_cast<A*>(partial.state) + static_cast<long long>(n) * (channels + kStatistics);
  A m = minus_infinity<A>();
  A sums[kTransformWarps], zs[kTransformWarps];
  GC_UNROLL
  for (int w = 0; w < kTransformWarps; ++w) m = Max::combine(m, from.stats[2 * w]);
  GC_UNROLL
  for (int w = 0; w < kTransformWarps; ++w) {
    const A weight = partial.stats != nullptr ? exp_below(from.stats[2 * w], m) : A(1);
    sums[w] = weight * from.sums[w * kWarp + lane];
    zs[w] = weight * from.stats[2 * w + 1];
  }
  const A sum = sum_of_warps(sums);
  const A z = sum_of_warps(zs);
  if (channel < channels) {
    state[kStatistics + channel] = partial.stats != nullptr ? sum / z : sum * static_cast<A>(partial.factor);
  }
  if (channel != 0) return;
  state[0] = partial.stats != nullptr ? m : A(0);
  state[1] = partial.stats != nullptr ? z : static_cast<A>(partial.pixels);
}

// The sum of one value of the splits, `stride` elements from one split's to the next's. The additions are those of
// merge_partials in groups of kGathered, and of add_partials in each of its rounds, so it has the same bits. kInFlight:
// loads before the first of them is used.
template <int kInFlight, typename A>
GC_DEVICE A sum_of_splits(const A* value, int splits, int stride) {
  constexpr int kAtOnce = 4;  // are added to each other first
  static_assert(kGathered % kInFlight == 0 && kInFlight % kAtOnce == 0);
  const int groups = (splits + kGathered - 1) / kGathered;
  A sum = 0;
  A together = 0;
  int left = splits;
  GC_UNROLL_BY(1)
  for (int g = 0; g < groups; ++g) {
    A of_group = 0;
    GC_UNROLL_BY(1)
    for (int k0 = 0; k0 < kGathered; k0 += kInFlight) {
      A part[kInFlight];
      GC_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        part[k] = k < left ? *value : A(0);
        value += stride;
      }
      GC_UNROLL
      for (int k = 0; k < kInFlight; k += kAtOnce) {
        if (left >= k + kAtOnce) {
          of_group += part[k] + part[k + 1] + part[k + 2] + part[k + 3];
        } else {  // one by one; those that are not there are 0
          of_group = of_group + part[k] + part[k + 1] + part[k + 2];
        }
      }
      left -= kInFlight;
    }
    if (g >= groups / kAtOnce * kAtOnce) {
      sum += of_group;
      continue;
    }
    together += of_group;
    if (g % kAtOnce != kAtOnce - 1) continue;
    sum += together;
    together = 0;
  }
  return sum;
}

// The part of one block among `blocks`. scratch: [2, kTransformThreads] in shared memory.
template <typename A>
GC_DEVICE void merge_late(const PartialContext& partial, int images, int channels, int block, int blocks, A* scratch) {
  const MergeShares<A> shares{scratch, scratch + kTransformThreads};
  const int slices = merge_slices(channels);
  GC_UNROLL_BY(1)
  for (int index = block; index < images * slices; index += blocks) {
    const int n = index / slices;
    const int channel = index % slices * kWarp + port::thread_index() % kWarp;
    if (index != block) port::sync_block<kSyncMergeDone>();
    merge_share(partial, channels, n, channel, shares);
    port::sync_block<kSyncMergeShares>();
    if (port::thread_index() < kWarp) merge_shares(partial, channels, n, channel, shares);
  }
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
