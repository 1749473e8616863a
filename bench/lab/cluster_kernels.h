// The exchange of meet_kernels.h inside clusters of blocks (sm_90 on): values go straight to the shared memory of every
// block of the cluster. Bytes a round and cluster: blocks x count x 4 over the network between multiprocessors.
#pragma once

#include "meet_kernels.h"

#if !defined(GC_HOST_RUN)

namespace gc::lab {

struct ClusterArgs {
  unsigned* out;     // [blocks, count]
  unsigned* failed;  // [1]
  Span* spans;       // [blocks]: from the end of round 1 to the end of the last
  int count;         // values of a cluster, a multiple of its blocks and at most kMaxCells
  int rounds;
};

constexpr int kOutgoing = kMaxCells / kMeetThreads;  // values that a thread sends

// Async: st.async, which counts its bytes on the mbarrier of the block it writes to; a set's mbarrier is used every
// other round, so its parity is that of round / 2. Otherwise st.shared::cluster and a barrier of the cluster.
//
// Two sets are enough: a block stores to the others for round r + 2 when it has all values of r + 1, which each of them
// sent after all its threads had read the values of r (the barrier that ends a round; without st.async the cluster's
// barrier in the middle of r + 1 says the same).
template <bool Async>
GC_KERNEL(kMeetThreads, 1)
exchange_in_cluster(const ClusterArgs args) {
  port::SharedArena arena;
  unsigned* const shared = arena.take<unsigned>(2 * kMaxCells);
  unsigned* const first = arena.take<unsigned>(kMaxCells);
  U64* const barriers = arena.take<U64>(2);
  const int thread = port::thread_index(), threads = port::block_threads(), block = port::block_x();
  const int size = cluster_blocks(), rank = cluster_rank(), group = block / size;
  const int begin = args.count * rank / size, own = args.count * (rank + 1) / size - begin;

  for (int i = thread; i < args.count; i += threads) first[i] = first_value(group, i);
  if (thread == 0) {
    init_mbarrier(barriers, 1);
    init_mbarrier(barriers + 1, 1);
    fence_mbarrier_init();
  }
  // What this thread sends next: value k of own x size goes to block k % size. It is computed before the barrier that
  // ends a round, so that nobody still reads the old values when the first of the new ones leaves.
  unsigned outgoing[kOutgoing];
  const auto prepare = [&](const unsigned* values) {
    GC_UNROLL for (int j = 0; j < kOutgoing; ++j) {
      const int k = j * threads + thread, i = begin + k / size;
      if (k < own * size) outgoing[j] = next_value(values[i], values[i + 1 < args.count ? i + 1 : 0]);
    }
  };
  port::sync_block<kSyncReady>();
  prepare(first);
  sync_cluster();
  bool good = true;
  const unsigned* last = first;
  for (int round = 1; round <= args.rounds && good; ++round) {
    const int set = round % 2;
    unsigned* const values = shared + set * kMaxCells;
    if (Async && thread == 0) arrive_expect(barriers + set, args.count * 4);
    GC_UNROLL for (int j = 0; j < kOutgoing; ++j) {
      const int k = j * threads + thread, i = begin + k / size, target = k % size;
      if (k >= own * size) continue;
      if constexpr (Async) {
        store_remote_async(remote_address(values + i, target), outgoing[j], remote_address(barriers + set, target));
      } else {
        store_remote(remote_address(values + i, target), outgoing[j]);
      }
    }
    if constexpr (Async) {
      // Round 1 is the first phase of barrier 1, round 2 of barrier 0, round 3 the second of barrier 1, ...
      good = await_phase(barriers + set, (round - 1) / 2 % 2);
      prepare(values);
      good = sync_and<kSyncRead>(good);
    } else {
      sync_cluster();
      prepare(values);
    }
    last = values;
    if (round == 1) note_begin(args.spans);
  }
  note_end(args.spans);
  if (thread == 0) {
    if (!good) store_relaxed(args.failed, 1);
  }
  for (int i = thread; i < args.count; i += threads) args.out[block * args.count + i] = last[i];
  sync_cluster();  // nobody leaves while others may still write to its shared memory
}

}  // namespace gc::lab

#endif
