#include "race.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "race_memory.h"
#include "scheduler.h"

namespace gc::host::race {
namespace {

struct ThreadState {
  Known acquired;    // ordered before what the thread does now
  Known releasable;  // as of its last fence: what a ticket of its publishes
  Known pending;     // what its tickets have read; a fence makes it acquired
  std::uint16_t clock = 0;
  bool fenced = false;  // in this epoch, and no access since
};

struct BlockState {
  std::uint32_t epoch = 0;
  std::vector<ThreadState> threads;
};

struct Counter {
  Known released;
  Stamp last;  // ticket or wait
};

ShadowedMemory memory;
std::unordered_map<const void*, Counter> counters;
std::unordered_map<int, BlockState> blocks;
std::uint32_t launch_number = 0;
int launch_threads = 0;
bool active = false;

// The running thread.
struct Me {
  int block;
  int thread;
  BlockState& block_state;
  ThreadState& state;

  Me(int block_, int thread_)
      : block(block_), thread(thread_), block_state(state_of(block_)), state(block_state.threads[thread_]) {}

  static BlockState& state_of(int block) {
    BlockState& state = blocks[block];
    if (state.threads.empty()) state.threads.resize(launch_threads);
    return state;
  }

  Stamp stamp(const void* pc) const {
    return {launch_number,
            block_state.epoch,
            static_cast<std::uint32_t>(block),
            static_cast<std::uint16_t>(thread),
            state.clock,
            static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(pc))};
  }

  // Is that access ordered before what this thread does now?
  bool after(const Stamp& stamp) const {
    if (stamp.launch != launch_number) return true;
    if (stamp.block == static_cast<std::uint32_t>(block)) {
      if (stamp.thread == thread || stamp.epoch < block_state.epoch) return true;
    }
    return state.acquired != nullptr && state.acquired->covers(stamp);
  }
};

std::string describe_pc(std::uint32_t pc) {
  char text[32];
  std::snprintf(text, sizeof text, "[pc 0x%x]", pc);
  return text;
}

std::string describe_stamp(const Stamp& stamp) {
  const std::string who = stamp.thread == kManyThreads ? "several threads of block " + std::to_string(stamp.block)
                                                       : describe(static_cast<int>(stamp.block), stamp.thread);
  return who + " " + describe_pc(stamp.pc);
}

[[noreturn]] void report_race(const void* address, const char* now, const Stamp& mine, const char* then,
                              const Stamp& other) {
  fail("data race on " + memory.describe(address) + ": the " + now + " by " + describe_stamp(mine) +
       " is not ordered after the " + then + " by " + describe_stamp(other));
}

void check_read(Cell& cell, const char* address, const Me& me, const Stamp& mine, Use use) {
  if (cell.write.launch == 0 && (use == Use::kOutput || use == Use::kShared)) {
    fail("uninitialised: " + describe_stamp(mine) + " reads " + memory.describe(address) +
         ", which nothing has written");
  }
  if (!me.after(cell.write)) report_race(address, "read", mine, "write", cell.write);
  if (use == Use::kInput) {  // never written: only the last to read it is kept, for the traffic
    cell.read = mine;
    return;
  }

  // Of the reads of one block in one epoch one stamp is kept; it stands for all of them.
  Stamp* kept = &cell.read;
  if (!me.after(cell.read) && cell.read.block != mine.block) {
    kept = nullptr;
    std::vector<Stamp>& others = memory.more_reads(cell);
    for (Stamp& other : others) {
      if (other.block == mine.block || me.after(other)) kept = &other;
    }
    if (kept == nullptr) kept = &others.emplace_back();
  }
  const bool others_too = !me.after(*kept);
  *kept = mine;
  if (others_too) kept->thread = kManyThreads;
}

void check_write(Cell& cell, const char* address, const Me& me, const Stamp& mine) {
  if (!me.after(cell.write)) report_race(address, "write", mine, "write", cell.write);
  if (!me.after(cell.read)) report_race(address, "write", mine, "read", cell.read);
  if (cell.more_reads != 0) {
    for (const Stamp& other : memory.more_reads(cell)) {
      if (!me.after(other)) report_race(address, "write", mine, "read", other);
    }
  }
  cell.write = mine;
}

// The block that took the last ticket may read and reset the counter at once.
void check_counter(const char* address, const Me& me, const Stamp& mine, bool write) {
  Counter& counter = counters[address];
  const Stamp& last = counter.last;
  if (!me.after(last)) report_race(address, write ? "write" : "read", mine, "ticket or wait", last);
  if (write) counter.released = nullptr;
}

}  // namespace

void* allocate(const std::string& name, std::size_t bytes, std::size_t offset, Use use) {
  return memory.allocate(name, bytes, offset, use);
}

void release(void* base) { memory.release(base); }

Traffic traffic_of(const void* address) {
  if (!memory.contains(address) || memory.cell(address).region == 0) return {};
  return memory.region(memory.cell(address)).traffic;
}

std::string describe_memory(const void* address) { return memory.describe(address); }

void prefetch(const void* address) {
  const Me me(current_place->block, current_place->thread);
  const bool known = memory.contains(address) && memory.cell(address).region != 0;
  if (!known) fail("out of bounds: " + describe_stamp(me.stamp(nullptr)) + " prefetches " + memory.describe(address));
  ++memory.region(memory.cell(address)).traffic.prefetched;
}

void begin_launch(int, int threads) {
  ++launch_number;
  launch_threads = threads;
  active = true;
}

void end_launch() {
  active = false;
  blocks.clear();
  counters.clear();
  memory.forget_reads();
}

void barrier(int block) {
  BlockState& state = Me::state_of(block);
  const auto merge = [&](Known ThreadState::* which) {
    auto all = std::make_shared<Knowledge>();
    const Knowledge* last = nullptr;
    for (const ThreadState& thread : state.threads) {
      const Known& known = thread.*which;
      if (known != nullptr && known.get() != last) all->add(*known);
      last = known.get();
    }
    return all;
  };
  Known acquired = merge(&ThreadState::acquired);
  Known pending = merge(&ThreadState::pending);
  std::shared_ptr<Knowledge> releasable = merge(&ThreadState::releasable);
  // When every thread has fenced all it did, that is the block's whole past: one number instead of one a thread.
  bool all_fenced = true;
  for (const ThreadState& thread : state.threads) all_fenced = all_fenced && thread.fenced;
  if (all_fenced) {
    const auto number = static_cast<std::uint32_t>(block);
    releasable->add_epoch(number, state.epoch + 1);
    releasable->clocks.erase(releasable->clocks.lower_bound({number, 0}),
                             releasable->clocks.upper_bound({number, kManyThreads}));
  }
  ++state.epoch;
  const Known released = releasable;
  for (ThreadState& thread : state.threads) {
    thread.acquired = acquired;
    thread.releasable = released;
    thread.pending = pending;
    thread.fenced = false;
  }
}

void fence(int block, int thread) {
  Me me(block, thread);
  me.state.acquired = join(me.state.acquired, me.state.pending);
  auto known =
      me.state.acquired == nullptr ? std::make_shared<Knowledge>() : std::make_shared<Knowledge>(*me.state.acquired);
  const auto number = static_cast<std::uint32_t>(block);
  known->add_epoch(number, me.block_state.epoch);
  known->add_clock(number, static_cast<std::uint16_t>(thread), me.state.clock);
  me.state.releasable = join(me.state.releasable, known);
  ++me.state.clock;
  me.state.fenced = true;
}

namespace {

// An atomic access to a counter. What it has published is then pending: a fence makes it acquired.
Counter& touch_counter(const Me& me, const unsigned* address, const char* how) {
  const Stamp mine = me.stamp(nullptr);
  if (!memory.contains(address) || memory.cell(address).region == 0) {
    fail("out of bounds: the " + std::string(how) + " by " + describe_stamp(mine) + " at " + memory.describe(address));
  }
  const char* const byte = reinterpret_cast<const char*>(address);
  for (std::size_t at = 0; at < sizeof(unsigned); at += kGranule) {
    Cell& cell = memory.cell(byte + at);
    if (!me.after(cell.write)) report_race(byte + at, how, mine, "write", cell.write);
    if (!me.after(cell.read)) report_race(byte + at, how, mine, "read", cell.read);
    cell.counter = true;
    counters[byte + at].last = mine;
  }
  Counter& counter = counters[byte];
  me.state.pending = join(me.state.pending, counter.released);
  return counter;
}

}  // namespace

void ticket(int block, int thread, const unsigned* address) {
  const Me me(block, thread);
  Counter& counter = touch_counter(me, address, "ticket");
  counter.released = join(counter.released, me.state.releasable);
}

void observe(int block, int thread, const unsigned* address) { touch_counter(Me(block, thread), address, "wait"); }

void access(const void* address, std::size_t bytes, bool write, const void* pc) {
  if (!active || current_place == nullptr || !memory.contains(address) || bytes == 0) return;
  Me me(current_place->block, current_place->thread);
  const Stamp mine = me.stamp(pc);
  const char* const begin = static_cast<const char*>(address);
  const Cell& first = memory.cell(address);
  Region& region = memory.region(first);
  if (first.region == 0 || begin < region.begin || begin + bytes > region.begin + region.bytes) {
    fail("out of bounds: " + describe_stamp(mine) + (write ? " writes " : " reads ") + std::to_string(bytes) +
         " bytes at " + memory.describe(address));
  }
  if (region.use != Use::kShared) check_waited(write ? "writes" : "reads", address);
  (write ? region.traffic.written : region.traffic.read) += bytes;
  if (write && region.use == Use::kInput) {
    fail("write to an input: " + describe_stamp(mine) + " writes " + memory.describe(address));
  }
  me.state.fenced = false;
  for (std::size_t at = 0; at < bytes; at += kGranule) {
    Cell& cell = memory.cell(begin + at);
    if (cell.in_flight) {
      fail("in flight: " + describe_stamp(mine) + (write ? " writes " : " reads ") + memory.describe(begin + at) +
           ", which a staged copy is still to write");
    }
    if (cell.counter) check_counter(begin + at, me, mine, write);
    if (write) {
      check_write(cell, begin + at, me, mine);
    } else {
      const bool again = cell.read.launch == mine.launch && cell.read.block == mine.block;
      if (!again) region.traffic.fetched += std::min(kGranule, bytes - at);
      check_read(cell, begin + at, me, mine, region.use);
    }
  }
}

void begin_copy(const void* to, const void* from, std::size_t bytes) {
  access(from, bytes, false, __builtin_return_address(0));
  access(to, bytes, true, __builtin_return_address(0));
  for (std::size_t at = 0; at < bytes; at += kGranule) {
    memory.cell(static_cast<const char*>(to) + at).in_flight = true;
  }
}

void end_copy(const void* to, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kGranule) {
    memory.cell(static_cast<const char*>(to) + at).in_flight = false;
  }
  access(to, bytes, true, __builtin_return_address(0));
}

void load(void* to, const void* from, std::size_t bytes) {
  access(from, bytes, false, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, std::size_t bytes) {
  access(to, bytes, true, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

}  // namespace gc::host::race
