// How fast one persistent block a multiprocessor fills its shared memory from DRAM, all of it in flight from the start;
// how fast it goes on when every tile is replaced once it has been used; and what reading and writing cost when they
// come in turn instead of mixed. Bytes are named at each kernel.
#pragma once

#include "copy_kernels.h"

namespace gc::lab {

enum class Fill { kAsync16, kAsync8, kAsync4, kLoads, kBulk };

LAB_BOTH constexpr int unit_bytes(Fill way) { return way == Fill::kAsync8 ? 8 : way == Fill::kAsync4 ? 4 : 16; }

// A block's slab is `rows` pieces of row_bytes, one from each row of a matrix whose rows are grid x row_bytes long:
// what a range of pixels of an NCHW map is. One row: the slab is contiguous.
struct FillArgs {
  const unsigned char* in;  // [rows, blocks, row_bytes]
  unsigned char* out;       // the same, or null; not null: the slab is poisoned first and written out at the end
  unsigned* failed;         // [1]
  Span* spans;              // [blocks], or null: from the first copy's issue until all the slab is there
  int rows;
  int row_bytes;  // a power of 2 if there are several rows
  int row_shift;  // log2(row_bytes); 30 for one row
};

// Bulk copies are one a row, or of so many bytes where there is one row.
constexpr int kBulkBytes = 16 * 1024;

// Bytes read: blocks x rows x row_bytes, each once.
template <Fill Way>
GC_KERNEL(512, 1)
fill_shared(const FillArgs args) {
  constexpr int kUnit = unit_bytes(Way);
  port::SharedArena arena;
  const int bytes = args.rows * args.row_bytes;
  unsigned char* const slab = arena.take<unsigned char>(bytes);
  U64* const barrier = arena.take<U64>(1);
  const int thread = port::thread_index(), threads = port::block_threads();
  const int pitch = port::grid_x() * args.row_bytes;
  const int own = port::block_x() * args.row_bytes;
  const int mask = (1 << args.row_shift) - 1;
  const auto place = [&](int offset) {  // of a byte of the slab in the matrix
    return static_cast<long long>(offset >> args.row_shift) * pitch + own + (offset & mask);
  };

  if (args.out != nullptr) {
    for (int i = thread * 4; i < bytes; i += threads * 4) *reinterpret_cast<unsigned*>(slab + i) = 0xa5a5a5a5u;
    if constexpr (Way == Fill::kBulk) fence_async_proxy();
  }
  if constexpr (Way == Fill::kBulk) {
    if (thread == 0) {
      init_mbarrier(barrier, 1);
      fence_mbarrier_init();
    }
  }
  port::sync_block<kSyncReady>();
  note_begin(args.spans);

  bool good = true;
  if constexpr (Way == Fill::kBulk) {
    if (thread == 0) arrive_expect(barrier, bytes);
    const int piece = args.rows > 1 ? args.row_bytes : kBulkBytes;
    for (int offset = thread * piece; offset < bytes; offset += threads * piece) {
      bulk_load(slab + offset, args.in + place(offset), bytes - offset < piece ? bytes - offset : piece, barrier);
    }
    good = await_phase(barrier, 0);
  } else if constexpr (Way == Fill::kLoads) {
    constexpr int kBatch = 8;
    for (int base = 0; base < bytes; base += kBatch * threads * 16) {
      Vec16 batch[kBatch];
      GC_UNROLL for (int j = 0; j < kBatch; ++j) {
        const int offset = base + (j * threads + thread) * 16;
        batch[j] =
            offset < bytes ? port::load_global(reinterpret_cast<const Vec16*>(args.in + place(offset))) : Vec16{};
      }
      GC_UNROLL for (int j = 0; j < kBatch; ++j) {
        const int offset = base + (j * threads + thread) * 16;
        if (offset < bytes) *reinterpret_cast<Vec16*>(slab + offset) = batch[j];
      }
    }
  } else {
    GC_UNROLL_BY(4)
    for (int offset = thread * kUnit; offset < bytes; offset += threads * kUnit) {
      copy_async<kUnit>(slab + offset, args.in + place(offset));
    }
    commit_copies();
    await_copies<0>();
  }
  good = sync_and<kSyncWritten>(good);
  note_end(args.spans);
  if (!good && thread == 0) store_relaxed(args.failed, 1);
  if (args.out != nullptr) {
    for (int offset = thread * 4; offset < bytes; offset += threads * 4) {
      *reinterpret_cast<unsigned*>(args.out + place(offset)) = *reinterpret_cast<const unsigned*>(slab + offset);
    }
  }
}

// --- steady state ---

constexpr int kTileBytes = 16 * 1024;
constexpr int kTileVectors = kTileBytes / 16;
constexpr int kSlots = 13;  // 208 KB
constexpr int kStreamThreads = 512;

enum class Sink { kSum, kWrite };

struct StreamArgs {
  const Vec16* in;   // [tiles, kTileVectors]
  Vec16* out;        // the same; kWrite
  unsigned* sums;    // [blocks, threads]: weighted words; kSum
  unsigned* failed;  // [1]
  int tiles;         // block b takes b, b + blocks, ...
};

// A ring of 13 tiles of 16 KB: wait for the oldest, use it, meet, ask for the one 13 further on.
// Bytes: tiles x 16 KB read once, and with kWrite written once.
template <bool Bulk, Sink To>
GC_KERNEL(kStreamThreads, 1)
stream_tiles(const StreamArgs args) {
  constexpr int kOwn = kTileVectors / kStreamThreads;  // vectors of a tile that a thread copies and uses
  port::SharedArena arena;
  Vec16* const ring = arena.take<Vec16>(kSlots * kTileVectors);
  U64* const barriers = arena.take<U64>(kSlots);
  const int thread = port::thread_index(), blocks = port::grid_x(), block = port::block_x();
  const int own_tiles = args.tiles > block ? (args.tiles - block + blocks - 1) / blocks : 0;
  const auto tile_at = [&](int k) { return (block + k * blocks) * kTileVectors; };  // vector index
  const auto request = [&](int k) {
    if constexpr (Bulk) {
      if (k < own_tiles && thread == 0) {
        arrive_expect(barriers + k % kSlots, kTileBytes);
        bulk_load(ring + k % kSlots * kTileVectors, args.in + tile_at(k), kTileBytes, barriers + k % kSlots);
      }
    } else {
      if (k < own_tiles) {
        GC_UNROLL for (int j = 0; j < kOwn; ++j) {
          const int i = j * kStreamThreads + thread;
          copy_async<16>(ring + k % kSlots * kTileVectors + i, args.in + tile_at(k) + i);
        }
      }
      commit_copies();  // an empty group keeps the count of groups right
    }
  };

  if constexpr (Bulk) {
    if (thread == 0) {
      for (int s = 0; s < kSlots; ++s) init_mbarrier(barriers + s, 1);
      fence_mbarrier_init();
    }
    port::sync_block<kSyncReady>();
  }
  for (int k = 0; k < kSlots; ++k) request(k);
  unsigned sum = 0;
  bool good = true;
  for (int k = 0; k < own_tiles && good; ++k) {
    if constexpr (Bulk) {
      good = await_phase(barriers + k % kSlots, k / kSlots % 2);
    } else {
      await_copies<kSlots - 1>();
    }
    good = sync_and<kSyncMet>(good);
    const Vec16* const tile = ring + k % kSlots * kTileVectors;
    GC_UNROLL for (int j = 0; j < kOwn; ++j) {
      const int i = j * kStreamThreads + thread;
      if constexpr (To == Sink::kSum) {
        sum += weighed(tile[i], tile_at(k) + i);
      } else {
        port::store_streaming(args.out + tile_at(k) + i, tile[i]);
      }
    }
    port::sync_block<kSyncRead>();
    request(k + kSlots);
  }
  if constexpr (!Bulk) await_copies<0>();
  if constexpr (To == Sink::kSum) args.sums[block * kStreamThreads + thread] = sum;
  if (!good && thread == 0) store_relaxed(args.failed, 1);
}

// --- phases ---

struct PhaseArgs {
  const Vec16* in;    // [slabs, blocks, kSlots x kTileVectors]
  Vec16* out;         // the same
  unsigned* counter;  // [1], zero at first
  unsigned* failed;   // [1]
  int slabs;
  bool read;  // false: only write; every slab has the pattern_words of the first one's place in out
  bool bulk;  // write by bulk copies from shared memory (sm_90 on)
};

// Every block fills its shared memory, all blocks meet, every block writes it, all meet: pure phases of reading and of
// writing, 28 MB each on an H100. Bytes: slabs x blocks x 208 KB read once and written once.
GC_KERNEL(kStreamThreads, 1) phases_in_turn(const PhaseArgs args) {
  constexpr int kVectors = kSlots * kTileVectors;
  port::SharedArena arena;
  Vec16* const slab = arena.take<Vec16>(kVectors);
  const int thread = port::thread_index(), blocks = port::grid_x();
  bool good = true;
  unsigned meetings = 0;
  for (int s = 0; s < args.slabs && good; ++s) {
    const long long place = (static_cast<long long>(s) * blocks + port::block_x()) * kVectors;
    if (args.read) {
      GC_UNROLL_BY(4)
      for (int i = thread; i < kVectors; i += kStreamThreads) copy_async<16>(slab + i, args.in + place + i);
      commit_copies();
      await_copies<0>();
      good = meet_by_counter(args.counter, ++meetings * blocks);
    } else if (s == 0) {
      for (int i = thread; i < kVectors; i += kStreamThreads) {
        GC_UNROLL for (int k = 0; k < 4; ++k) slab[i].word[k] = pattern_word(static_cast<unsigned>(place + i), k);
      }
      port::sync_block<kSyncReady>();
    }
    if (args.bulk) {
#if !defined(GC_HOST_RUN)
      fence_async_proxy();
      port::sync_block<kSyncReady>();
      if (thread < kSlots) {
        bulk_store(args.out + place + thread * kTileVectors, slab + thread * kTileVectors, kTileBytes);
        await_bulk_stores();
      }
#endif
    } else {
      for (int i = thread; i < kVectors; i += kStreamThreads) port::store_streaming(args.out + place + i, slab[i]);
    }
    if (args.read && good) {
      good = meet_by_counter(args.counter, ++meetings * blocks);
    } else {
      port::sync_block<kSyncRead>();
    }
  }
  if (!good && thread == 0) store_relaxed(args.failed, 1);
}

}  // namespace gc::lab
