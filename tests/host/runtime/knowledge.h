// What a thread of a launch knows to have happened: which accesses of other blocks are ordered before its next one.
//
// Inside a block only barriers order memory, and they order all of it, so a block's past is one number: its epoch, the
// count of barriers it has passed. A device fence is finer, since it orders the accesses of a single thread up to
// there; a thread's clock counts its fences. A full vector clock with an entry for each thread is never needed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

namespace gc::host::race {

// Where in its thread's life an access happened.
struct Stamp {
  std::uint32_t launch = 0;  // 0: no access
  std::uint32_t epoch = 0;
  std::uint32_t block = 0;
  std::uint16_t thread = 0;  // kManyThreads: at least two threads of the block, in this epoch
  std::uint16_t clock = 0;
  std::uint32_t pc = 0;
};
inline constexpr std::uint16_t kManyThreads = 0xffff;

struct Knowledge {
  std::map<std::uint32_t, std::uint32_t> epochs;  // block -> all its accesses of earlier epochs are known
  std::map<std::pair<std::uint32_t, std::uint16_t>, std::uint16_t>
      clocks;  // (block, thread) -> its accesses up to here

  bool covers(const Stamp& stamp) const {
    const auto epoch = epochs.find(stamp.block);
    if (epoch != epochs.end() && stamp.epoch < epoch->second) return true;
    const auto clock = clocks.find({stamp.block, stamp.thread});
    return clock != clocks.end() && stamp.clock <= clock->second;
  }

  void add_epoch(std::uint32_t block, std::uint32_t epoch) {
    auto& known = epochs[block];
    if (known < epoch) known = epoch;
  }
  void add_clock(std::uint32_t block, std::uint16_t thread, std::uint16_t clock) {
    auto& known = clocks[{block, thread}];
    if (known < clock) known = clock;
  }
  void add(const Knowledge& other) {
    for (const auto& [block, epoch] : other.epochs) add_epoch(block, epoch);
    for (const auto& [thread, clock] : other.clocks) add_clock(thread.first, thread.second, clock);
  }
};

// Shared by all that know the same; never changed. Null: nothing.
using Known = std::shared_ptr<const Knowledge>;

inline Known join(const Known& a, const Known& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  auto both = std::make_shared<Knowledge>(*a);
  both->add(*b);
  return both;
}

}  // namespace gc::host::race
