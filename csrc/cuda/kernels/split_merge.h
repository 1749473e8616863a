// Splits of one image run in different blocks. Their partial results are merged in two rounds: the last block of a
// group to arrive merges the group's partial results, and the last of these blocks merges the groups'. The order of the
// additions is that of the splits and groups, whatever the order of arrival, so a result never depends on timing.
//
// In one round, one block would read all partial results one after the other, and the whole launch would wait for it:
// on an H100 pooling of 2x1024x50x84 took 52 us in one round and takes 36 in two.
#pragma once

#include "geometry.h"
#include "port.h"
#include "sites.h"

namespace gc {

// True in every thread of the last of `blocks` blocks to call this with the same counter. What the other blocks wrote
// to global memory before their call is then visible. The counter is 0 before the launch, and again after it.
GC_DEVICE bool arrive_last(unsigned* counter, int blocks, int* shared_flag) {
  // One thread fences for the block: a fence orders all that happens before it, and the barriers put the other threads'
  // writes before the release and their reads after the acquire.
  port::sync_block<kSyncBeforeTicket>();
  if (port::thread_index() == 0) {
    port::fence_device<kFenceRelease>();
    const bool last = port::take_ticket(counter) == static_cast<unsigned>(blocks - 1);
    port::fence_device<kFenceAcquire>();
    if (last) *counter = 0;
    *shared_flag = last;
  }
  port::sync_block<kSyncAfterTicket>();
  return *shared_flag != 0;
}

inline constexpr int kMergedResult = -1;

// To be called when this block has written partial result `own` of `partials`. Calls merge(first, how many, to) for
// each range of them that this block is to merge: `to` is the number of the group's partial result, from `partials` on,
// or kMergedResult.
// tickets: [merge_tickets(partials, group)].
template <typename MergeRange>
GC_DEVICE void merge_partials(int own, int partials, int group, unsigned* tickets, int* shared_flag,
                              const MergeRange& merge) {
  const int groups = groups_of(partials, group);
  unsigned* ticket = tickets + own / group;
  int first = own / group * group;
  int count = partials - first < group ? partials - first : group;
  int to = groups > 1 ? partials + own / group : kMergedResult;
  GC_UNROLL_BY(1)
  while (arrive_last(ticket, count, shared_flag)) {
    merge(first, count, to);
    if (to == kMergedResult) return;
    ticket = tickets + groups;
    first = partials;
    count = groups;
    to = kMergedResult;
  }
}

// Adds `count` partial results [count, channels], each times its weight, for the block's chunk of channels. In order,
// but kAtOnce of them to each other first, for rounding errors grow with the length of a chain of additions.
template <typename A, typename Map, typename Weight, typename Write>
GC_DEVICE void add_partials(const Map& map, const A* partials, int count, const Weight& weight, const Write& write) {
  constexpr int kChannelsAtOnce = 4, kAtOnce = 4;  // the product is a thread's loads in flight
  const int step = port::block_threads();
  const int end = map.end_channel();
  for (int c0 = map.channel0 + port::thread_index(); c0 < end; c0 += kChannelsAtOnce * step) {
    const auto add_one = [&](A(&sum)[kChannelsAtOnce], int k) {
      const A* const partial = partials + static_cast<long long>(k) * map.channels;
      GC_UNROLL
      for (int i = 0; i < kChannelsAtOnce; ++i) {
        if (c0 + i * step < end) sum[i] += weight(k) * partial[c0 + i * step];
      }
    };
    A sum[kChannelsAtOnce] = {};
    int k = 0;
    GC_UNROLL_BY(1)
    for (; k + kAtOnce <= count; k += kAtOnce) {
      A together[kChannelsAtOnce] = {};
      GC_UNROLL
      for (int j = 0; j < kAtOnce; ++j) add_one(together, k + j);
      GC_UNROLL
      for (int i = 0; i < kChannelsAtOnce; ++i) sum[i] += together[i];
    }
    GC_UNROLL_BY(1)
    for (; k < count; ++k) add_one(sum, k);
    GC_UNROLL
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      if (c0 + i * step < end) write(c0 + i * step, sum[i]);
    }
  }
}

// The same without weights, for chunks of hardly more channels than the block has threads: a thread takes one channel,
// and has kAtOnce loads in flight to the end.
template <int kAtOnce, typename A, typename Map, typename Write>
GC_DEVICE void sum_partials(const Map& map, const A* partials, int count, const Write& write) {
  const int end = map.end_channel();
  GC_UNROLL_BY(1)
  for (int c = map.channel0 + port::thread_index(); c < end; c += port::block_threads()) {
    const A* partial = partials + c;
    A sum = 0;
    GC_UNROLL_BY(1)
    for (int left = count; left > 0; left -= kAtOnce) {
      unsigned step = map.channels;
      port::forget(step);  // otherwise the compiler keeps multiples of it, from before the tiles on
      A part[kAtOnce];
      GC_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        part[k] = k < left ? *partial : A(0);
        partial += step;
      }
      GC_UNROLL
      for (int half = kAtOnce / 2; half > 0; half /= 2) {
        GC_UNROLL
        for (int k = 0; k < half; ++k) part[k] += part[k + half];
      }
      sum += part[0];
    }
    write(c, sum);
  }
}

}  // namespace gc
