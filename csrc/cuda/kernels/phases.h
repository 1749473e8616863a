// Phases of one launch: blocks of a later phase work on what all blocks of the phase before have written.
//
// No barrier of the whole grid: a block learns by a ticket which phase it serves, in the order in which blocks begin to
// run, so it only ever waits for blocks that run already or are done. That never hangs, however few blocks a device can
// hold and whatever else runs on it, and a later phase's blocks are in place when their input is complete.
#pragma once

#include "args.h"
#include "port.h"
#include "sites.h"

namespace gc {

class Phase {
 public:
  // counters: [kPhaseCounters], 0 before the launch and after it. shared_ticket: one int of shared memory.
  GC_DEVICE Phase(const PhaseGrid& grid, unsigned* counters, int* shared_ticket) : grid_(grid), counters_(counters) {
    if (port::thread_index() == 0) *shared_ticket = static_cast<int>(port::take_ticket(counters));
    port::sync_block<kSyncPhaseTicket>();
    block_ = *shared_ticket;
    GC_UNROLL
    for (int p = 0; p < kMaxPhases - 1; ++p) {
      if (number_ == p && block_ >= grid.blocks[p]) {
        block_ -= grid.blocks[p];
        ++number_;
      }
    }
  }

  GC_DEVICE int number() const { return number_; }
  // This block among the phase's.
  GC_DEVICE int block() const { return block_; }
  GC_DEVICE int blocks() const { return blocks_of(number_); }

  // To be called before the phase's work: what the phases before have written is visible from here on.
  GC_DEVICE void await_previous() const {
    if (number_ == 0) return;
    if (port::thread_index() == 0) {
      port::wait_for(finished(number_ - 1), static_cast<unsigned>(blocks_of(number_ - 1)));
      port::fence_device<kFencePhaseAcquire>();
    }
    port::sync_block<kSyncPhaseBegins>();
  }

  // To be called after it. The last block of the last phase puts the counters back to 0.
  GC_DEVICE void finish() const {
    port::sync_block<kSyncPhaseEnds>();
    if (port::thread_index() != 0) return;
    port::fence_device<kFencePhaseRelease>();
    const unsigned before = port::take_ticket(finished(number_));
    if (number_ != grid_.phases - 1 || before != static_cast<unsigned>(blocks() - 1)) return;
    port::fence_device<kFencePhaseReset>();
    for (int i = 0; i <= grid_.phases; ++i) counters_[i] = 0;
  }

 private:
  GC_DEVICE unsigned* finished(int phase) const { return counters_ + 1 + phase; }
  GC_DEVICE int blocks_of(int phase) const {  // without an index into the arguments, which would copy them
    int blocks = grid_.blocks[0];
    GC_UNROLL
    for (int p = 1; p < kMaxPhases; ++p) blocks = phase == p ? grid_.blocks[p] : blocks;
    return blocks;
  }

  const PhaseGrid& grid_;
  unsigned* counters_;
  int number_ = 0;
  int block_ = 0;
};

// Waits for the previous phase as late as may be: a weight matrix, and the gradient that is given, can be fetched
// before.
class PreviousPhase {
 public:
  GC_DEVICE explicit PreviousPhase(const Phase& phase) : phase_(phase) {}

  GC_DEVICE void await() {
    if (!awaited_) phase_.await_previous();
    awaited_ = true;
  }

 private:
  const Phase& phase_;
  bool awaited_ = false;
};

}  // namespace gc
