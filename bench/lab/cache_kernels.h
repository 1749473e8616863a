// What the second-level cache does for us: reading after a prefetch into it, and reading again what it was wished to
// keep. One block of 512 threads a multiprocessor; a block reads the same range each time.
#pragma once

#include "copy_kernels.h"

#if !defined(GC_HOST_RUN)

namespace gc::lab {

constexpr int kCacheThreads = 512;

enum class Prefetch { kNone, kLines, kBulk };

GC_DEVICE void pause_ns(U64 duration) {
  const U64 begin = global_timer();
  for (unsigned tries = 0; tries < kTries && global_timer() - begin < duration; ++tries) {
  }
}

// The weighted sum of this block's vectors [0, count), which lie at `place` of the buffer.
template <Hint H>
GC_DEVICE unsigned read_range(const Vec16* in, long long place, int count) {
  constexpr int kBatch = 8;
  unsigned sum = 0;
  for (int base = 0; base < count; base += kBatch * kCacheThreads) {
    Vec16 batch[kBatch];
    GC_UNROLL for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kCacheThreads + port::thread_index();
      if (i < count) batch[j] = load_hinted<H>(in + place + i);
    }
    GC_UNROLL for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kCacheThreads + port::thread_index();
      if (i < count) sum += weighed(batch[j], static_cast<unsigned>(place + i));
    }
  }
  return sum;
}

struct PrefetchArgs {
  const Vec16* in;  // [blocks, count]
  unsigned* sums;   // [blocks, threads]
  Span* spans;      // [blocks]: the read after the pause
  int count;        // vectors a block
  unsigned pause;   // ns from the prefetch to the read
};

// Bytes: blocks x count x 16 read once.
template <Prefetch Way>
GC_KERNEL(kCacheThreads, 1)
read_after_prefetch(const PrefetchArgs args) {
  const int thread = port::thread_index();
  const long long place = static_cast<long long>(port::block_x()) * args.count;
  const auto bytes = reinterpret_cast<const unsigned char*>(args.in + place);
  const int length = args.count * 16;
  if constexpr (Way == Prefetch::kLines) {
    for (int offset = thread * 128; offset < length; offset += kCacheThreads * 128) prefetch_line(bytes + offset);
  } else if constexpr (Way == Prefetch::kBulk) {
    constexpr int kPiece = 8192;
    const int offset = thread * kPiece;
    if (offset < length) prefetch_bulk(bytes + offset, length - offset < kPiece ? length - offset : kPiece);
  }
  pause_ns(args.pause);
  port::sync_block<kSyncReady>();
  note_begin(args.spans);
  args.sums[port::block_x() * kCacheThreads + thread] = read_range<Hint::kNone>(args.in, place, args.count);
  note_end(args.spans);
}

struct RereadArgs {
  const Vec16* passing;  // [blocks, passing_count]: wanted again
  const Vec16* kept;     // [blocks, kept_count]: read once
  unsigned* sums;        // [3, blocks, threads]: the first read, the other one, the second read
  unsigned* counter;     // [1], zero at first
  unsigned* failed;      // [1]
  Span* spans;           // [blocks]: the second read of passing
  int passing_count;     // vectors a block
  int kept_count;        // vectors a block
  bool passing_last;     // the order of the first two reads
};

// Bytes: blocks x (2 x passing + kept) x 16 asked for; the second read of passing from DRAM as far as it is gone.
template <Hint Passing, Hint Kept>
GC_KERNEL(kCacheThreads, 1)
read_again(const RereadArgs args) {
  const int thread = port::thread_index(), blocks = port::grid_x(), block = port::block_x();
  const long long passing = static_cast<long long>(block) * args.passing_count;
  const long long kept = static_cast<long long>(block) * args.kept_count;
  unsigned* const sums = args.sums + block * kCacheThreads + thread;
  const int stride = blocks * kCacheThreads;
  bool good = true;
  for (int turn = 0; turn < 2 && good; ++turn) {
    if (args.passing_last == (turn == 1)) {
      sums[0] = read_range<Passing>(args.passing, passing, args.passing_count);
    } else {
      sums[stride] = read_range<Kept>(args.kept, kept, args.kept_count);
    }
    good = meet_by_counter(args.counter, (turn + 1) * blocks);
  }
  note_begin(args.spans);
  sums[2 * stride] = read_range<Passing>(args.passing, passing, args.passing_count);
  note_end(args.spans);
  if (!good && thread == 0) store_relaxed(args.failed, 1);
}

}  // namespace gc::lab

#endif
