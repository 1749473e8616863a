// Splits of one image run in different blocks; the block that arrives last merges their partial results, in split order
// whatever the order of arrival, so a result never depends on timing.
#pragma once

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

// Adds `count` rows of [count, channels], each times its weight and in order, for the block's chunk of channels.
template <typename A, typename Map, typename Weight, typename Write>
GC_DEVICE void add_rows(const Map& map, const A* rows, int count, const Weight& weight, const Write& write) {
  for (int c = map.channel0 + port::thread_index(); c < map.end_channel(); c += port::block_threads()) {
    A sum = 0;
    GC_UNROLL_BY(8)
    for (int k = 0; k < count; ++k) sum += weight(k) * rows[static_cast<long long>(k) * map.channels + c];
    write(c, sum);
  }
}

}  // namespace gc
