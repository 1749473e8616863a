// Splits of one image run in different blocks, and their partial results are merged in two rounds: the last block of a
// group of splits to arrive merges the group's, the last of these the groups'. One block alone, reading all splits one
// after the other, held up the whole launch: on an H100 pooling took 52 us at 2x1024x50x84 so, and 36 in two rounds.
// The order of the additions is that of the splits and groups, whatever the order of arrival, so a result never
// depends on timing.
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

// To be called when this block has written part `part` of `parts`: calls merge(first part, how many, to), in which
// `to` is the part that takes the sum or kMergedResult. Parts from `parts` on are the groups' results.
// tickets: [merge_tickets(parts, group)].
template <typename Merge>
GC_DEVICE void merge_parts(int part, int parts, int group, unsigned* tickets, int* shared_flag, const Merge& merge) {
  const int groups = groups_of(parts, group);
  unsigned* ticket = tickets + part / group;
  int first = part / group * group;
  int count = parts - first < group ? parts - first : group;
  int to = groups > 1 ? parts + part / group : kMergedResult;
  GC_UNROLL_BY(1)
  while (arrive_last(ticket, count, shared_flag)) {
    merge(first, count, to);
    if (to == kMergedResult) return;
    ticket = tickets + groups;
    first = parts;
    count = groups;
    to = kMergedResult;
  }
}

// Adds `count` rows of [count, channels], each times its weight, for the block's chunk of channels: in order, but
// kRowsAtOnce of them to each other first, for the rounding errors grow with the length of a chain of additions.
template <typename A, typename Map, typename Weight, typename Write>
GC_DEVICE void add_rows(const Map& map, const A* rows, int count, const Weight& weight, const Write& write) {
  constexpr int kChannelsAtOnce = 4, kRowsAtOnce = 4;  // the product is a thread's loads in flight
  const int step = port::block_threads();
  const int end = map.end_channel();
  for (int c0 = map.channel0 + port::thread_index(); c0 < end; c0 += kChannelsAtOnce * step) {
    const auto add_row = [&](A(&sum)[kChannelsAtOnce], int k) {
      const A* const row = rows + static_cast<long long>(k) * map.channels;
      GC_UNROLL
      for (int i = 0; i < kChannelsAtOnce; ++i) {
        if (c0 + i * step < end) sum[i] += weight(k) * row[c0 + i * step];
      }
    };
    A sum[kChannelsAtOnce] = {};
    int k = 0;
    GC_UNROLL_BY(1)
    for (; k + kRowsAtOnce <= count; k += kRowsAtOnce) {
      A part[kChannelsAtOnce] = {};
      GC_UNROLL
      for (int j = 0; j < kRowsAtOnce; ++j) add_row(part, k + j);
      GC_UNROLL
      for (int i = 0; i < kChannelsAtOnce; ++i) sum[i] += part[i];
    }
    GC_UNROLL_BY(1)
    for (; k < count; ++k) add_row(sum, k);
    GC_UNROLL
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      if (c0 + i * step < end) write(c0 + i * step, sum[i]);
    }
  }
}

}  // namespace gc
