#include "scheduler.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "race.h"

namespace gc::host {

const Place* current_place = nullptr;
Grid current_grid;
int current_threads = 0;

namespace {

enum class State { kReady, kAtBarrier, kAtShuffle, kAtCounter, kDone };

struct Block;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

// When staged copies are done.
enum class CopyTime { kAtOnce, kLater, kWhenAwaited };

struct Thread {
  Place place{};
  Block* block = nullptr;
  State state = State::kReady;
  int site = -1;                      // of the barrier it waits at
  const unsigned* counter = nullptr;  // that it waits for
  bool has_arena = false;
  std::vector<Copy> copies;  // that it has staged and not yet awaited
  std::size_t copied = 0;    // of these
  Fiber fiber;
};

struct Warp {
  std::uint64_t given[kWarpThreads];
  std::uint64_t taken[kWarpThreads];
  int lane_mask[kWarpThreads];
  int arrived = 0;
};

struct SharedArray {
  void* memory;
  int count;
  int element_bytes;
};

// A block in flight, and the fibers that it borrows: block slots outlive blocks.
struct Block {
  int number = -1;  // none
  int at_barrier = 0;
  int done = 0;
  int shared_bytes = 0;
  bool lets_next_begin = false;
  std::vector<SharedArray> shared;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
};

struct Launch {
  const std::function<void()>* kernel;
  Grid grid;
  int threads;
  int shared_bytes;
  ReadySet ready;
  std::vector<int> to_come;  // blocks, the next one last
  std::vector<Block> blocks;
  CopyTime copy_time;
  LaunchReport report;
  std::string failure;
  bool failed = false;
};

Launch* current = nullptr;
Thread* running = nullptr;
int dropped_site = -1;
std::array<bool, kMaxSites> reached{};

int first_place(const Block& block) { return static_cast<int>(&block - current->blocks.data()) * current->threads; }

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  current->ready.add(first_place(*thread.block) + thread.place.thread);
}

// Notes that a launch has come to this site; false if it is dropped.
bool reach(int site) {
  reached[site] = true;
  return site != dropped_site;
}

// Lets others run before this thread goes on.
void yield() {
  make_ready(*running);
  Fiber::pause();
}

void copy_next() {
  const Copy& copy = running->copies[running->copied++];
  std::memcpy(copy.to, copy.from, copy.bytes);
}

// Some of the copies that are due later are done now.
void copy_some() {
  if (current->copy_time != CopyTime::kLater) return;
  for (std::size_t left = (running->copies.size() - running->copied + 1) / 2; left > 0; --left) copy_next();
}

void wait(State state) {
  running->state = state;
  Fiber::pause();
}

// "0-31, 40"
std::string list_of(const std::vector<int>& numbers) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (end - i > 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

// "threads 0-15 wait in a shuffle; threads 16-31 wait at barrier 3"
std::string describe_threads(const Block& block) {
  std::map<std::string, std::vector<int>> groups;
  for (const auto& thread : block.threads) {
    std::string where;
    switch (thread->state) {
      case State::kReady:
        where = "can run";
        break;
      case State::kAtBarrier:
        where = "wait at barrier " + std::to_string(thread->site);
        break;
      case State::kAtShuffle:
        where = "wait in a shuffle";
        break;
      case State::kAtCounter:
        where = "wait for a counter, now " + std::to_string(*thread->counter);
        break;
      case State::kDone:
        where = "have left the kernel";
        break;
    }
    groups[where].push_back(thread->place.thread);
  }
  std::string text = "block " + std::to_string(block.number) + ":";
  for (const auto& [where, threads] : groups) {
    text += std::string(text.back() == ':' ? "" : ";") + " threads " + list_of(threads) + " " + where;
  }
  return text;
}

void release_barrier_if_complete(Block& block) {
  const int threads = current->threads;
  if (block.at_barrier == 0 || block.at_barrier + block.done < threads) return;
  bool same = block.done == 0;
  for (const auto& thread : block.threads) same = same && thread->site == block.threads[0]->site;
  if (!same) fail("divergent barrier: " + describe_threads(block));
  if constexpr (kRaceBuild) race::barrier(block.number);
  block.at_barrier = 0;
  for (const auto& thread : block.threads) make_ready(*thread);
}

void run_kernel() {
  try {
    (*current->kernel)();
    if (!running->copies.empty()) {
      fail("in flight: " + describe(running->place.block, running->place.thread) +
           " ends before what it has staged is there");
    }
    const Place& place = running->place;
    if (!place.waited) {
      fail("early start: " + describe(place.block, place.thread) + " leaves without a wait for the launch before");
    }
    running->state = State::kDone;
    ++running->block->done;
    release_barrier_if_complete(*running->block);
  } catch (const std::exception& error) {
    current->failed = true;
    current->failure = std::string("exception in a kernel: ") + error.what();
  }
  Fiber::pause();
}

void free_shared(Block& block) {
  for (const SharedArray& array : block.shared) release(array.memory, 0);
  block.shared.clear();
}

void start_block(Block& block, int number) {
  const Grid& grid = current->grid;
  block.number = number;
  block.at_barrier = block.done = block.shared_bytes = 0;
  block.lets_next_begin = false;
  block.warps.assign((current->threads + kWarpThreads - 1) / kWarpThreads, Warp{});
  for (int i = 0; i < current->threads; ++i) {
    Thread& thread = *block.threads[i];
    thread.place = {i,      number % grid.x,       number / grid.x % grid.y, number / grid.x / grid.y,
                    number, !current->report.early};
    thread.site = -1;
    thread.has_arena = false;
    thread.copies.clear();
    thread.copied = 0;
    thread.fiber.start(&run_kernel);
  }
  current->ready.new_block(first_place(block), current->threads);
  for (const auto& thread : block.threads) make_ready(*thread);
}

void finish_block(Block& block) {
  current->report.shared_bytes = std::max(current->report.shared_bytes, block.shared_bytes);
  current->report.lets_next_begin = current->report.lets_next_begin && block.lets_next_begin;
  free_shared(block);
  block.number = -1;
}

void report_deadlock() {
  current->failed = true;
  current->failure = "deadlock:";
  for (const Block& block : current->blocks) {
    if (block.number >= 0) current->failure += " " + describe_threads(block) + ".";
  }
}

void run_to_end() {
  for (Block& block : current->blocks) {
    start_block(block, current->to_come.back());
    current->to_come.pop_back();
  }
  int in_flight = static_cast<int>(current->blocks.size());
  while (in_flight > 0 && !current->failed) {
    if (current->ready.empty()) return report_deadlock();
    const int place = current->ready.take();
    Block& block = current->blocks[place / current->threads];
    running = block.threads[place % current->threads].get();
    current_place = &running->place;
    running->fiber.resume();
    running = nullptr;
    current_place = nullptr;
    if (current->failed || block.done < current->threads) continue;
    finish_block(block);
    if (current->to_come.empty()) {
      --in_flight;
    } else {
      start_block(block, current->to_come.back());
      current->to_come.pop_back();
    }
  }
}

std::vector<int> order_of_blocks(int blocks, const Schedule& schedule) {
  std::vector<int> order(blocks);  // the first to run last
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kAscending) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kRandom || schedule.order == Order::kStarvation) {
    std::shuffle(order.begin(), order.end(), std::mt19937(schedule.seed));
  }
  return order;
}

int blocks_in_flight(int blocks, const Schedule& schedule) {
  switch (schedule.order) {
    case Order::kRandom:
      return std::min(blocks, 4);
    case Order::kStarvation:
      return std::min(blocks, 6);
    default:
      return 1;
  }
}

void check_limits(Grid grid, int threads, int shared_bytes, int shared_limit) {
  const auto check = [](bool ok, const std::string& message) {
    if (!ok) throw LaunchError("launch limits: " + message);
  };
  check(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "a grid of no blocks");
  check(grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ,
        "grid.y = " + std::to_string(grid.y) + ", grid.z = " + std::to_string(grid.z) + ", at most 65535 each");
  check(threads >= 1 && threads <= kMaxBlockThreads, std::to_string(threads) + " threads a block, at most 1024");
  check(shared_bytes >= 0 && shared_bytes <= shared_limit,
        std::to_string(shared_bytes) + " bytes of dynamic shared memory, allowed are " + std::to_string(shared_limit));
}

}  // namespace

LaunchReport launch(Grid grid, int threads, int shared_bytes, const Schedule& schedule,
                    const std::function<void()>& kernel, int shared_limit, bool early) {
  check_limits(grid, threads, shared_bytes, shared_limit);
  const int blocks = grid.x * grid.y * grid.z;
  const int in_flight = blocks_in_flight(blocks, schedule);
  set_poison(schedule.poison());
  Launch launch{&kernel,
                grid,
                threads,
                shared_bytes,
                ReadySet(schedule, in_flight * threads),
                order_of_blocks(blocks, schedule),
                {},
                static_cast<CopyTime>(schedule.seed % 3),
                {},
                "",
                false};
  launch.report.early = early;
  launch.blocks.resize(in_flight);
  for (Block& block : launch.blocks) {
    for (int i = 0; i < threads; ++i) {
      block.threads.push_back(std::make_unique<Thread>());
      block.threads.back()->block = &block;
    }
  }
  current = &launch;
  current_grid = grid;
  current_threads = threads;
  if constexpr (kRaceBuild) race::begin_launch(blocks, threads);
  run_to_end();
  if constexpr (kRaceBuild) race::end_launch();
  for (Block& block : launch.blocks) free_shared(block);
  current = nullptr;
  if (launch.failed) throw LaunchError(launch.failure);
  return launch.report;
}

void fail(const std::string& message) {
  if (!Fiber::inside()) throw LaunchError(message);
  current->failed = true;
  current->failure = message;
  Fiber::pause();
  __builtin_unreachable();  // a failed launch resumes nobody
}

std::string describe(int block, int thread) {
  const Grid& grid = current_grid;
  return "block " + std::to_string(block) + " (" + std::to_string(block % grid.x) + ", " +
         std::to_string(block / grid.x % grid.y) + ", " + std::to_string(block / grid.x / grid.y) + ") thread " +
         std::to_string(thread);
}

void barrier(int site) {
  if (!reach(site)) return;
  copy_some();
  Thread& self = *running;
  self.site = site;
  self.state = State::kAtBarrier;
  ++self.block->at_barrier;
  release_barrier_if_complete(*self.block);
  Fiber::pause();
}

void fence(int site) {
  if (!reach(site)) return;
  if constexpr (kRaceBuild) race::fence(running->place.block, running->place.thread);
}

std::uint64_t shuffle(std::uint64_t bits, int lane_mask) {
  const Place place = running->place;
  const int lane = place.thread % kWarpThreads;
  if (lane_mask < 1 || lane_mask >= kWarpThreads) fail("shuffle: lane mask " + std::to_string(lane_mask));
  if (place.thread - lane + kWarpThreads > current->threads) {
    fail("shuffle: " + describe(place.block, place.thread) + " is in a warp of fewer than 32 threads");
  }
  Block& block = *running->block;
  Warp& warp = block.warps[place.thread / kWarpThreads];
  warp.given[lane] = bits;
  warp.lane_mask[lane] = lane_mask;
  if (++warp.arrived < kWarpThreads) {
    wait(State::kAtShuffle);
    return warp.taken[lane];
  }
  warp.arrived = 0;
  const int first = place.thread - lane;
  for (int i = 0; i < kWarpThreads; ++i) {
    if (warp.lane_mask[i] != lane_mask) {
      fail("shuffle: " + describe(place.block, first + i) + " has lane mask " + std::to_string(warp.lane_mask[i]) +
           " where thread " + std::to_string(place.thread) + " has " + std::to_string(lane_mask));
    }
    warp.taken[i] = warp.given[i ^ lane_mask];
  }
  for (int i = 0; i < kWarpThreads; ++i) {
    if (i != lane) make_ready(*block.threads[first + i]);
  }
  yield();
  return warp.taken[lane];
}

unsigned take_ticket(unsigned* counter) {
  check_waited("takes a ticket of", counter);
  yield();
  if constexpr (kRaceBuild) race::ticket(running->place.block, running->place.thread, counter);
  const unsigned old = (*counter)++;
  for (Block& block : current->blocks) {
    for (const auto& thread : block.threads) {
      if (thread->state == State::kAtCounter && thread->counter == counter) make_ready(*thread);
    }
  }
  yield();
  return old;
}

void wait_for(const unsigned* counter, unsigned value) {
  check_waited("waits for", counter);
  yield();
  while (*counter < value) {
    running->counter = counter;
    wait(State::kAtCounter);
  }
  if constexpr (kRaceBuild) race::observe(running->place.block, running->place.thread, counter);
}

void wait_for_launch_before(int site) {
  if (!reach(site) || running->place.waited) return;
  yield();
  running->place.waited = true;
}

void let_next_launch_begin() { running->block->lets_next_begin = true; }

void report_not_waited(const char* does, const void* address) {
  const Place& place = *current_place;
  fail("early start: " + describe(place.block, place.thread) + " " + does + " " + name_of_memory(address) +
       " before it has waited for the launch before");
}

void stage(void* to, const void* from, std::size_t bytes) {
  check_vector(to, bytes);
  check_vector(from, bytes);
  check_waited("copies", from);
  if constexpr (kRaceBuild) race::begin_copy(to, from, bytes);
  running->copies.push_back({to, from, bytes});
  if (current->copy_time == CopyTime::kAtOnce) {
    copy_next();
  } else {
    std::memset(to, current_poison(), bytes);
  }
}

void await_staged(int site) {
  if (!reach(site)) return;
  while (running->copied < running->copies.size()) copy_next();
  if constexpr (kRaceBuild) {
    for (const Copy& copy : running->copies) race::end_copy(copy.to, copy.bytes);
  }
  running->copies.clear();
  running->copied = 0;
}

void open_arena() {
  if (running->has_arena) fail("shared memory: a thread's second arena hands out the bytes of the first again");
  running->has_arena = true;
}

void* take_shared(int ordinal, int count, int element_bytes) {
  Block& block = *running->block;
  const Place& place = running->place;
  if (count < 0) fail("shared memory: an array of " + std::to_string(count) + " elements");
  if (ordinal == static_cast<int>(block.shared.size())) {
    const int bytes = count * element_bytes;
    const std::string name = "shared array " + std::to_string(ordinal) + " of block " + std::to_string(block.number);
    block.shared.push_back({allocate(name, bytes, 0, Use::kShared), count, element_bytes});
    block.shared_bytes += (bytes + 15) / 16 * 16;
    if (block.shared_bytes > current->shared_bytes) {
      fail("shared memory: " + name + " makes it " + std::to_string(block.shared_bytes) + " bytes, launched with " +
           std::to_string(current->shared_bytes));
    }
  }
  const SharedArray& array = block.shared[ordinal];
  if (array.count != count || array.element_bytes != element_bytes) {
    fail("shared memory: " + describe(place.block, place.thread) + " takes array " + std::to_string(ordinal) + " as " +
         std::to_string(count) + " x " + std::to_string(element_bytes) + " bytes, another thread as " +
         std::to_string(array.count) + " x " + std::to_string(array.element_bytes));
  }
  return array.memory;
}

void drop_site(int site) { dropped_site = site; }

std::vector<int> sites_reached() {
  std::vector<int> sites;
  for (int site = 0; site < kMaxSites; ++site) {
    if (reached[site]) sites.push_back(site);
  }
  return sites;
}

}  // namespace gc::host
