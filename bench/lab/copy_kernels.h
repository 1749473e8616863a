// The yardsticks: a copy, a read and a write of a flat buffer by a grid of small blocks. Every thread has four 16-byte
// accesses in flight. Bytes moved: copy 2 x 16 x count, the others 16 x count.
#pragma once

#include "device.h"

namespace gc::lab {

constexpr int kCopyThreads = 256;
constexpr int kCopyBatch = 4;  // 16-byte vectors a thread

struct CopyArgs {
  const Vec16* in;  // [count]
  Vec16* out;       // [count]; sum_words: [blocks] words
  Span* spans;      // [blocks], or null: not noted
  int count;        // vectors
};

GC_KERNEL(kCopyThreads, 1) copy_vectors(const CopyArgs args) {
  note_begin(args.spans);
  const int begin = port::block_x() * kCopyThreads * kCopyBatch + port::thread_index();
  Vec16 batch[kCopyBatch];
  GC_UNROLL for (int j = 0; j < kCopyBatch; ++j) {
    const int i = begin + j * kCopyThreads;
    if (i < args.count) batch[j] = port::load_global(args.in + i);
  }
  GC_UNROLL for (int j = 0; j < kCopyBatch; ++j) {
    const int i = begin + j * kCopyThreads;
    if (i < args.count) port::store_streaming(args.out + i, batch[j]);
  }
  note_end(args.spans);
}

// The sum of a thread's words, each weighted by its place in the buffer.
GC_DEVICE unsigned weighed(const Vec16& v, unsigned vector_index) {
  unsigned sum = 0;
  GC_UNROLL for (int k = 0; k < 4; ++k) sum += v.word[k] * weight(vector_index * 4 + k);
  return sum;
}

// The read: sums[block, thread] = the weighted words that the thread has read. With count = 16 bytes x 4 a thread it
// writes 1/16 of what it reads; the grid strides, so a persistent grid writes next to nothing.
struct SumArgs {
  const Vec16* in;  // [count]
  unsigned* sums;   // [blocks, threads]
  Span* spans;      // [blocks], or null
  int count;        // vectors
};

GC_KERNEL(512, 1) sum_words(const SumArgs args) {
  constexpr int kBatch = 8;
  note_begin(args.spans);
  const int threads = port::block_threads();
  const int stride = port::grid_x() * threads * kBatch;
  unsigned sum = 0;
  for (int base = port::block_x() * threads * kBatch; base < args.count; base += stride) {
    Vec16 batch[kBatch];
    GC_UNROLL for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * threads + port::thread_index();
      batch[j] = i < args.count ? port::load_global(args.in + i) : Vec16{};
    }
    GC_UNROLL for (int j = 0; j < kBatch; ++j) sum += weighed(batch[j], base + j * threads + port::thread_index());
  }
  args.sums[port::block_x() * threads + port::thread_index()] = sum;
  note_end(args.spans);
}

// The write, and what fills the inputs with pattern_word.
struct WriteArgs {
  Vec16* out;   // [count]
  Span* spans;  // [blocks], or null
  int count;    // vectors
};

GC_KERNEL(kCopyThreads, 1) write_random(const WriteArgs args) {
  note_begin(args.spans);
  const int begin = port::block_x() * kCopyThreads * kCopyBatch + port::thread_index();
  GC_UNROLL for (int j = 0; j < kCopyBatch; ++j) {
    const int i = begin + j * kCopyThreads;
    if (i >= args.count) continue;
    Vec16 v;
    GC_UNROLL for (int k = 0; k < 4; ++k) v.word[k] = pattern_word(i, k);
    port::store_streaming(args.out + i, v);
  }
  note_end(args.spans);
}

}  // namespace gc::lab
