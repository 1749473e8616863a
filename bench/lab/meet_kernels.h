// How blocks meet: rounds of an all-gather in groups of blocks, one persistent block a multiprocessor. In a round each
// block makes its share of `count` values from those of the round before, publishes them, and has all `count` of its
// group before it goes on; so a round is one exchange on a chain of them, and a lost or torn value spoils all that
// follow. Bytes a round and group: count x 8 (cells) or count x 4 (words) written once and read by every block.
//
// Two sets of cells or words in turn are enough: a block writes those of round r when it has all values of r - 1, and
// whoever made these had read all of r - 2.
#pragma once

#include "device.h"

namespace gc::lab {

constexpr int kMeetThreads = 512;
constexpr int kMaxCells = 2048;

enum class Meet {
  kCells,           // {value, tag} words, relaxed stores and polls
  kCounter,         // words; barrier, fence, atomic on one counter, relaxed poll by one thread, fence, barrier
  kReleaseAcquire,  // words; as kCounter, with red.release and ld.acquire instead of fences
  kFlags,           // words; barrier, fence, a flag a block; every thread polls a flag, fence, barrier
};

struct MeetArgs {
  Cell* cells;        // [2, groups, count], zero at first
  unsigned* words;    // [2, groups, count]
  unsigned* counter;  // [groups, 32], zero at first: a line of its own for each group
  unsigned* flags;    // [blocks], zero at first
  unsigned* out;      // [blocks, count]: what each block had after the last round
  unsigned* failed;   // [1], set when a wait gave up
  Span* spans;        // [blocks]: from the end of round 1 to the end of the last
  int group;          // blocks that exchange; the last group may have fewer
  int count;          // values of a group, at most kMaxCells
  int rounds;
};

LAB_BOTH unsigned first_value(int group, int i) { return random_word(group * kMaxCells + i); }
LAB_BOTH unsigned next_value(unsigned own, unsigned neighbour) { return own * 1664525u + neighbour + 1013904223u; }

// Copies all cells of a group to shared memory as they come, up to four in flight a thread.
GC_DEVICE bool gather_cells(const Cell* cells, unsigned* values, int count, unsigned tag) {
  const int threads = port::block_threads(), thread = port::thread_index();
  for (int base = 0; base < count; base += 4 * threads) {
    Cell found[4];
    GC_UNROLL for (int j = 0; j < 4; ++j) {
      const int i = base + j * threads + thread;
      if (i < count) host_turn(&cells[i].tag, tag);
    }
    bool all = false;
    for (unsigned tries = 0; !all; ++tries) {
      if (tries == kTries) return false;
      all = true;
      GC_UNROLL for (int j = 0; j < 4; ++j) {
        const int i = base + j * threads + thread;
        if (i < count) {
          found[j] = observe(cells + i);
          all = all && found[j].tag == tag;
        }
      }
    }
    GC_UNROLL for (int j = 0; j < 4; ++j) {
      const int i = base + j * threads + thread;
      if (i < count) values[i] = found[j].value;
    }
  }
  return true;
}

template <Meet Way>
GC_KERNEL(kMeetThreads, 1)
exchange(const MeetArgs args) {
  port::SharedArena arena;
  unsigned* const shared = arena.take<unsigned>(2 * kMaxCells);
  const int thread = port::thread_index(), threads = port::block_threads(), block = port::block_x();
  const int group = block / args.group, rank = block - group * args.group;
  const int rest = port::grid_x() - group * args.group;
  const int size = rest < args.group ? rest : args.group;
  const int groups = (port::grid_x() + args.group - 1) / args.group;
  const int begin = args.count * rank / size, end = args.count * (rank + 1) / size;
  unsigned* const counter = args.counter + group * 32;

  for (int i = thread; i < args.count; i += threads) shared[i] = first_value(group, i);
  port::sync_block<kSyncReady>();
  bool good = true;
  for (int round = 1; round <= args.rounds && good; ++round) {
    const unsigned* const old = shared + (round - 1) % 2 * kMaxCells;
    unsigned* const values = shared + round % 2 * kMaxCells;
    const int place = (round % 2 * groups + group) * args.count;
    for (int i = begin + thread; i < end; i += threads) {
      const unsigned value = next_value(old[i], old[i + 1 < args.count ? i + 1 : 0]);
      if constexpr (Way == Meet::kCells) {
        publish(args.cells + place + i, value, round);
      } else {
        args.words[place + i] = value;
      }
    }
    if constexpr (Way == Meet::kCells) {
      good = gather_cells(args.cells + place, values, args.count, round);
    } else {
      port::sync_block<kSyncWritten>();
      if constexpr (Way == Meet::kFlags) {
        if (thread == 0) {
          port::fence_device<kFenceBefore>();
          raise_flag(args.flags + block, round);
        }
        if (thread < size) {
          good = await_count(args.flags + block - rank + thread, round);
          port::fence_device<kFenceAfter>();
        }
      } else if (thread == 0) {
        const unsigned target = round * size;
        if constexpr (Way == Meet::kCounter) {
          port::fence_device<kFenceBefore>();
          port::take_ticket(counter);
          good = await_count(counter, target);
          port::fence_device<kFenceAfter>();
        } else {
          add_release(counter);
          good = await_count_acquire(counter, target);
        }
      }
      good = sync_and<kSyncMet>(good);
      for (int i = thread; i < args.count; i += threads) values[i] = load_word(args.words + place + i);
    }
    good = sync_and<kSyncRead>(good);
    if (round == 1) note_begin(args.spans);
  }
  note_end(args.spans);
  if (thread == 0) {
    if (!good) store_relaxed(args.failed, 1);
  }
  const unsigned* const last = shared + args.rounds % 2 * kMaxCells;
  for (int i = thread; i < args.count; i += threads) args.out[block * args.count + i] = last[i];
}

// Step 1 of the chain: every block has a value for each of `count` channels and wants, for its own channels, those of
// all blocks. Bytes a round: blocks x count x 8 written and read once. A block's state is the sum of what it has read.
struct ScatterArgs {
  Cell* cells;       // [2, blocks, count], zero at first
  unsigned* out;     // [blocks]: the state after the last round
  unsigned* failed;  // [1]
  Span* spans;       // [blocks]
  int count;         // channels, at least one a block
  int rounds;
};

LAB_BOTH unsigned scattered_value(unsigned state, int channel, int round) { return state * weight(channel) + round; }

GC_KERNEL(kMeetThreads, 1) scatter_cells(const ScatterArgs args) {
  port::SharedArena arena;
  unsigned* const parts = arena.take<unsigned>(kMeetThreads);
  unsigned* const state = arena.take<unsigned>(1);
  const int thread = port::thread_index(), threads = port::block_threads(), block = port::block_x();
  const int blocks = port::grid_x();
  const int begin = args.count * block / blocks, own = args.count * (block + 1) / blocks - begin;

  if (thread == 0) *state = random_word(block);
  port::sync_block<kSyncReady>();
  bool good = true;
  for (int round = 1; round <= args.rounds && good; ++round) {
    Cell* const cells = args.cells + static_cast<long long>(round % 2) * blocks * args.count;
    for (int c = thread; c < args.count; c += threads) {
      publish(cells + block * args.count + c, scattered_value(*state, c, round), round);
    }
    unsigned sum = 0;
    for (int base = 0; base < own * blocks && good; base += 8 * threads) {
      Cell found[8];
      const Cell* from[8];
      GC_UNROLL for (int j = 0; j < 8; ++j) {
        const int i = base + j * threads + thread;
        from[j] = i < own * blocks ? cells + i / own * args.count + begin + i % own : nullptr;
        if (from[j] != nullptr) host_turn(&from[j]->tag, round);
      }
      bool all = false;
      for (unsigned tries = 0; !all && good; ++tries) {
        good = tries < kTries;
        all = true;
        GC_UNROLL for (int j = 0; j < 8; ++j) {
          if (from[j] == nullptr) continue;
          found[j] = observe(from[j]);
          all = all && found[j].tag == static_cast<unsigned>(round);
        }
      }
      GC_UNROLL for (int j = 0; j < 8; ++j) {
        if (from[j] != nullptr) sum += found[j].value;
      }
    }
    parts[thread] = sum;
    good = sync_and<kSyncMet>(good);
    if (thread < 32) {
      unsigned total = 0;
      for (int i = thread; i < threads; i += 32) total += parts[i];
      GC_UNROLL for (int mask = 16; mask > 0; mask /= 2) total += port::shuffle_xor(total, mask);
      if (thread == 0) *state = total;
    }
    port::sync_block<kSyncRead>();
    if (round == 1) note_begin(args.spans);
  }
  note_end(args.spans);
  if (thread == 0) {
    if (!good) store_relaxed(args.failed, 1);
    args.out[block] = *state;
  }
}

}  // namespace gc::lab
