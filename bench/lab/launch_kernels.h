// What a launch costs: small kernels that depend on each other, kernels that hold multiprocessors, and a meeting of
// blocks of which some may not run yet. Bytes are negligible.
#pragma once

#include "cache_kernels.h"
#include "fill_kernels.h"
#include "meet_kernels.h"

#if !defined(GC_HOST_RUN)

namespace gc::lab {

GC_KERNEL(32, 1) do_nothing(const FillArgs) {}

// Keeps the stream busy while the host fills the queue behind it.
GC_KERNEL(32, 1) hold_stream(unsigned duration_ns) { pause_ns(duration_ns); }

// clocks[0] = cycles, clocks[1] = ns of a loop of arithmetic, clocks[2] = the smallest step of the global timer in ns:
// the clock that the multiprocessor really runs at.
GC_KERNEL(32, 1) measure_clock(U64* clocks, unsigned duration_ns) {
  if (port::thread_index() != 0) return;
  const long long cycles = clock64();
  const U64 begin = global_timer();
  U64 now = begin, least = ~0ull;
  for (unsigned tries = 0; tries < kTries && now - begin < duration_ns; ++tries) {
    const U64 next = global_timer();
    if (next != now && next - now < least) least = next - now;
    now = next;
  }
  clocks[0] = clock64() - cycles;
  clocks[1] = now - begin;
  clocks[2] = least;
}

struct StepArgs {
  const unsigned* in;  // [blocks x threads]
  unsigned* out;
};

LAB_BOTH unsigned stepped(unsigned value) { return value * 3 + 1; }

// One of three small dependent kernels. Programmatic: it lets the next start at once and waits for the one before to be
// complete, and so for all before that, as each of them waited.
template <bool Programmatic>
GC_KERNEL(512, 1)
small_step(const StepArgs args) {
  if constexpr (Programmatic) {
    allow_next_kernel();
    wait_for_previous_kernel();
  }
  const int i = port::block_x() * port::block_threads() + port::thread_index();
  args.out[i] = stepped(__ldcg(args.in + i));
}

struct HolderArgs {
  volatile unsigned* running;  // host memory: how many blocks of the holder run
  unsigned* arrivals;          // [1], zero at first
  U64* ends;                   // [blocks]
  U64 duration_ns;
};

// Takes a multiprocessor for each of its blocks (by its shared memory) for so long.
GC_KERNEL(32, 1) hold_multiprocessors(const HolderArgs args) {
  if (port::thread_index() != 0) return;
  const U64 begin = global_timer();
  if (atomicAdd(args.arrivals, 1u) + 1 == static_cast<unsigned>(port::grid_x())) {
    *args.running = port::grid_x();
    __threadfence_system();
  }
  U64 now = begin;
  for (unsigned tries = 0; tries < kTries && now - begin < args.duration_ns; ++tries) {
    __nanosleep(500);
    now = global_timer();
  }
  args.ends[port::block_x()] = now;
}

struct RoleArgs {
  Cell* cells;       // [blocks], zero at first
  unsigned* claims;  // [blocks], zero at first
  unsigned* out;     // [blocks]: the sum of all values, from whoever played the role
  unsigned* failed;  // [1]
  Span* spans;       // [blocks], zero at first: begin of each block that runs; end of each role
  U64 patience_ns;   // then a block that waits plays the roles that nobody has claimed
  U64 limit_ns;      // then it gives up
};

LAB_BOTH unsigned role_value(int role) { return random_word(role) | 1u; }

// One exchange of cells between roles. A block claims its own role; one that has waited too long claims all that nobody
// plays; a block that finds its role taken leaves. At most 512 roles.
GC_KERNEL(kMeetThreads, 1) meet_by_roles(const RoleArgs args) {
  port::SharedArena arena;
  unsigned* const seen = arena.take<unsigned>(kMeetThreads);
  const int thread = port::thread_index(), roles = port::grid_x(), block = port::block_x();
  bool mine = false;
  if (thread == block) {
    args.spans[block].begin = global_timer();
    mine = atomicExch(args.claims + block, 1u) == 0;
    if (mine) publish(args.cells + block, role_value(block), 1);
  }
  if (__syncthreads_or(mine) == 0) return;
  const U64 begin = global_timer();
  bool have = thread >= roles;
  seen[thread] = 0;
  bool adopted = false;
  for (bool all = false; !all;) {
    for (int tries = 0; tries < 16 && !have; ++tries) {
      const Cell cell = observe(args.cells + thread);
      have = cell.tag == 1;
      if (have) seen[thread] = cell.value;
    }
    all = __syncthreads_and(have) != 0;
    if (all) break;
    const U64 waited = global_timer() - begin;
    const bool late = __syncthreads_or(waited > args.patience_ns) != 0;
    const bool over = __syncthreads_or(waited > args.limit_ns) != 0;
    if (over) {
      if (thread == 0) store_relaxed(args.failed, 1);
      return;
    }
    if (late && !adopted) {
      adopted = true;
      if (thread < roles && !mine && atomicExch(args.claims + thread, 1u) == 0) {
        mine = true;
        publish(args.cells + thread, role_value(thread), 1);
      }
    }
  }
  unsigned sum = 0;
  for (int i = 0; i < roles; ++i) sum += seen[i];
  if (mine) {
    args.out[thread] = sum;
    args.spans[thread].end = global_timer();
  }
}

}  // namespace gc::lab

#endif
