// The pool of regions that are zero at rest, with host memory in place of the device's.
#include "cuda/launch/region_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "check.h"

namespace gc::units {
namespace {

// What a test decides and sees of the memory below a pool.
struct World {
  std::atomic<int> allocations{0};
  std::atomic<bool> full{false};
  std::function<void()> during;  // called in every call of Memory
  std::mutex mutex;
  std::vector<std::unique_ptr<char[]>> blocks;

  void* zeroed(int64_t bytes) {
    ++allocations;
    if (const auto call = during) call();
    if (full) throw std::bad_alloc();
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.push_back(std::make_unique<char[]>(bytes + kSliceBytes));
    const auto address = reinterpret_cast<uintptr_t>(blocks.back().get());
    return reinterpret_cast<void*>((address + kSliceBytes - 1) / kSliceBytes * kSliceBytes);
  }
};

struct HostMemory {
  World* world;

  using Mark = std::shared_ptr<std::atomic<bool>>;

  void* zeroed(int, int64_t bytes) const { return world->zeroed(bytes); }
  bool passed(const Mark& mark) const {
    if (world->during) world->during();
    return mark->load(std::memory_order_acquire);
  }
};

using Pool = RegionPool<HostMemory>;

HostMemory::Mark mark(bool passed) { return std::make_shared<std::atomic<bool>>(passed); }

// Remembers what is in use; a byte must not be in use twice.
class InUse {
 public:
  void add(const void* start, int64_t bytes) {
    const char* const from = static_cast<const char*>(start);
    for (const auto& [other, size] : parts_) REQUIRE(from + bytes <= other || other + size <= from);
    parts_.insert({from, bytes});
  }

 private:
  std::set<std::pair<const char*, int64_t>> parts_;
};

// A graph, which holds regions.
struct Graph {
  uint64_t id;
  std::vector<Region*> held = {};

  void* slice(Pool& pool, int64_t bytes, int device = 0) {
    return pool.of_capture(device, id, bytes, [&](Region* region) {
      held.push_back(region);
      return true;
    });
  }
  void destroy(Pool& pool) {
    for (Region* region : held) pool.release(region);
    held.clear();
  }
};

void streams_keep_their_regions_apart() {
  World world;
  Pool pool(HostMemory{&world});
  InUse used;
  std::map<std::pair<int, uint64_t>, void*> regions;
  for (int device = 0; device < 2; ++device) {
    for (uint64_t stream = 0; stream < 300; ++stream) {
      void* const region = pool.of_stream(device, stream, 100);
      used.add(region, kRegionBytes);
      regions[{device, stream}] = region;
    }
  }
  for (const auto& [key, region] : regions) REQUIRE(pool.of_stream(key.first, key.second, kRegionBytes) == region);
  REQUIRE(world.allocations == 4);  // 256 regions at once, for 300 streams of two devices
}

void a_region_that_has_become_too_small_is_lent_to_nobody() {
  World world;
  Pool pool(HostMemory{&world});
  InUse used;
  void* const small = pool.of_stream(0, 1, 100);
  used.add(small, kRegionBytes);
  void* const large = pool.of_stream(0, 1, 5 * kRegionBytes);
  used.add(large, 5 * kRegionBytes);
  REQUIRE(pool.of_stream(0, 1, 100) == large);
  for (uint64_t stream = 2; stream < 600; ++stream) used.add(pool.of_stream(0, stream, 100), kRegionBytes);
}

void two_threads_that_ask_for_one_stream_get_one_region() {
  World world;
  Pool pool(HostMemory{&world});
  InUse used;
  void* faster = nullptr;
  world.during = [&] {  // while the slower one waits for memory
    world.during = nullptr;
    faster = pool.of_stream(0, 1, 2 * kRegionBytes);
  };
  REQUIRE(pool.of_stream(0, 1, 2 * kRegionBytes) == faster);
  REQUIRE(faster != nullptr && world.allocations == 2);
  used.add(faster, 2 * kRegionBytes);
  used.add(pool.of_stream(0, 2, 2 * kRegionBytes), 2 * kRegionBytes);
  REQUIRE(world.allocations == 2);  // the slower one's memory
}

void many_streams_are_told_to_borrow() {
  World world;
  Pool pool(HostMemory{&world});
  for (uint64_t stream = 0; stream < kMostStreams; ++stream) REQUIRE(pool.of_stream(0, stream, 100) != nullptr);
  REQUIRE(pool.of_stream(0, kMostStreams, 100) == nullptr);
  REQUIRE(pool.of_stream(1, 0, 100) == nullptr);
  REQUIRE(pool.of_stream(0, 0, 100) != nullptr);
  REQUIRE(pool.of_stream(0, 7, 3 * kRegionBytes) != nullptr);
}

void a_loan_is_lent_again_when_its_launch_has_ended() {
  World world;
  Pool pool(HostMemory{&world});
  InUse used;
  const HostMemory::Mark first_end = mark(false);
  auto first = pool.borrow(0, 100);
  auto second = pool.borrow(0, 100);
  Region* const first_region = first.region;
  Region* const second_region = second.region;
  used.add(first_region->start, kRegionBytes);
  used.add(second_region->start, kRegionBytes);
  first.mark = first_end;
  second.mark = mark(false);
  pool.give_back(std::move(first));
  pool.give_back(std::move(second));
  auto third = pool.borrow(0, 100);
  used.add(third.region->start, kRegionBytes);  // neither of the two, which are still in use
  first_end->store(true);
  auto fourth = pool.borrow(0, 100);
  REQUIRE(fourth.region == first_region);
  REQUIRE(fourth.mark == first_end);
  // Not one of another size or device.
  fourth.mark = mark(true);
  pool.give_back(std::move(fourth));
  REQUIRE(pool.borrow(0, 2 * kRegionBytes).region->bytes == 2 * kRegionBytes);
  REQUIRE(pool.borrow(1, 100).region->device == 1);
}

void loans_in_turn_need_no_new_memory() {
  World world;
  Pool pool(HostMemory{&world});
  for (int i = 0; i < 5000; ++i) {
    auto loan = pool.borrow(0, 100);
    loan.mark = mark(true);
    pool.give_back(std::move(loan));
  }
  REQUIRE(world.allocations == 1);
}

void launches_of_a_graph_share_nothing() {
  World world;
  Pool pool(HostMemory{&world});
  InUse used;
  Graph one{1}, other{2};
  for (int i = 0; i < 400; ++i) {  // in turn, as when two threads capture
    for (Graph* graph : {&one, &other}) {
      for (const int64_t bytes : {4, 128, 500, 1 + (i % 7) * 700, i % 50 == 0 ? 9000 : 60}) {
        void* const slice = graph->slice(pool, bytes, i % 2);
        REQUIRE(reinterpret_cast<uintptr_t>(slice) % kSliceBytes == 0);
        used.add(slice, bytes);
      }
    }
    used.add(pool.of_stream(0, i, 100), kRegionBytes);
    used.add(pool.borrow(0, 100).region->start, kRegionBytes);
  }
  REQUIRE(one.held.size() < 600);  // several slices to a region
}

void graphs_that_come_and_go_need_no_new_memory() {
  World world;
  Pool pool(HostMemory{&world});
  Graph lasting{1};
  InUse used;
  for (int i = 0; i < 20; ++i) used.add(lasting.slice(pool, 300), 300);
  for (uint64_t id = 2; id < 5000; ++id) {
    Graph graph{id};
    InUse both = used;
    for (int i = 0; i < 30; ++i) both.add(graph.slice(pool, 300), 300);
    graph.destroy(pool);
  }
  REQUIRE(world.allocations == 1);
}

// An id is never used twice, but a capture may go on while regions of an earlier graph come back.
void what_is_cut_up_is_not_given_back_with_another_graph() {
  World world;
  Pool pool(HostMemory{&world});
  Graph first{1}, second{2};
  first.slice(pool, 100);
  first.destroy(pool);
  void* const begin = second.slice(pool, 100);  // the same region
  REQUIRE(second.held.size() == 1);
  InUse used;
  used.add(begin, 100);
  used.add(second.slice(pool, 100), 100);
  REQUIRE(second.held.size() == 1);
  // And a capture whose regions came back does not cut on.
  second.destroy(pool);
  Graph third{3}, again{2};
  InUse later;
  later.add(third.slice(pool, 100), 100);
  later.add(again.slice(pool, 100), 100);
  REQUIRE(again.held.size() == 1);
}

void a_graph_that_cannot_hold_a_region_gets_none() {
  World world;
  Pool pool(HostMemory{&world});
  const auto refuse = [&](Region* region) {
    pool.release(region);
    return false;
  };
  for (int i = 0; i < 1000; ++i) REQUIRE(pool.of_capture(0, 1, 100, refuse) == nullptr);
  REQUIRE(world.allocations == 1);
  InUse used;
  Graph graph{1};
  used.add(graph.slice(pool, 100), 100);
  for (uint64_t stream = 0; stream < 255; ++stream) used.add(pool.of_stream(0, stream, 100), kRegionBytes);
  REQUIRE(world.allocations == 1);  // none was lost, none came back twice
}

void lack_of_memory_leaves_the_pool_as_it_was() {
  World world;
  Pool pool(HostMemory{&world});
  Graph graph{1};
  void* const before = pool.of_stream(0, 1, 100);
  world.full = true;
  const auto fails = [&](const std::function<void()>& call) {
    try {
      call();
    } catch (const std::bad_alloc&) {
      return true;
    }
    return false;
  };
  const int64_t much = 4 * kRegionBytes;
  REQUIRE(fails([&] { pool.of_stream(0, 1, much); }));
  REQUIRE(fails([&] { pool.borrow(0, much); }));
  REQUIRE(fails([&] { graph.slice(pool, much); }));
  REQUIRE(pool.of_stream(0, 1, 100) == before);
  REQUIRE(graph.held.empty());
  world.full = false;
  InUse used;
  used.add(before, kRegionBytes);
  used.add(pool.of_stream(0, 1, much), much);
  used.add(pool.borrow(0, much).region->start, much);
  used.add(graph.slice(pool, much), much);
}

// A graph's regions come back on a thread that CUDA calls wait for: then a lock held over such a call is a deadlock.
void regions_come_back_during_calls_that_wait_for_it() {
  World world;
  Pool pool(HostMemory{&world});
  uint64_t next = 1;
  int waited = 0;
  const auto come_back = [&](Region* region) {
    auto done = std::async(std::launch::async, [&pool, region] { pool.release(region); });
    REQUIRE(done.wait_for(std::chrono::seconds(20)) == std::future_status::ready);
    ++waited;
  };
  std::vector<Region*> retired;
  for (int i = 0; i < 8; ++i) {
    Graph graph{1000 + next++};
    graph.slice(pool, kRegionBytes);
    retired.push_back(graph.held.front());
  }
  world.during = [&] {
    if (retired.empty()) return;
    Region* const region = retired.back();
    retired.pop_back();
    come_back(region);
  };
  pool.of_stream(0, 1, 2 * kRegionBytes);
  auto loan = pool.borrow(0, 4 * kRegionBytes);
  loan.mark = mark(false);
  pool.give_back(std::move(loan));
  pool.borrow(0, 4 * kRegionBytes);  // asks, and then makes a new one
  pool.of_capture(0, 5, 8 * kRegionBytes, [&](Region*) {
    world.during();
    return true;
  });
  REQUIRE(waited == 6);
}

// A launch's use of counters: they are zero before it, no other launch runs on them, and they are zero after it.
class Launch {
 public:
  Launch(void* counters, int64_t bytes) : first_(static_cast<std::atomic<unsigned>*>(counters)), count_(bytes / 4) {}
  void begin() const {
    for (int64_t i = 0; i < count_; i += 16) REQUIRE(first_[i].exchange(1, std::memory_order_relaxed) == 0);
  }
  void end() const {
    for (int64_t i = 0; i < count_; i += 16) REQUIRE(first_[i].exchange(0, std::memory_order_relaxed) == 1);
  }

 private:
  std::atomic<unsigned>* first_;
  int64_t count_;
};

// Threads with streams of their own and streams in common, borrowing streams, and graphs that are made, replayed and
// destroyed, all at once. What a thread has borrowed is still running when it borrows more.
void threads_at_once() {
  World world;
  Pool pool(HostMemory{&world});
  constexpr int kThreads = 4, kRounds = 400;
  std::atomic<uint64_t> next_capture{1};
  std::mutex common;  // the order of a stream that all threads use
  const auto work = [&](int thread) {
    std::mt19937 random(thread);
    struct Running {
      Launch launch;
      HostMemory::Mark mark;
    };
    std::vector<Running> running;
    struct Captured {
      Graph graph;
      std::vector<Launch> launches;
    };
    std::vector<Captured> graphs;
    const auto sizes = [&] { return std::array<int64_t, 4>{64, 512, 5000, 20000}[random() % 4]; };
    for (int round = 0; round < kRounds; ++round) {
      const int64_t bytes = sizes();
      switch (random() % 4) {
        case 0: {
          const Launch launch(pool.of_stream(0, 1 + thread * 100 + random() % 3, bytes), bytes);
          launch.begin();
          launch.end();
          break;
        }
        case 1: {
          void* const counters = pool.of_stream(0, 0, bytes);
          const std::lock_guard<std::mutex> order(common);
          const Launch launch(counters, bytes);
          launch.begin();
          launch.end();
          break;
        }
        case 2: {
          auto loan = pool.borrow(0, bytes);
          const Launch launch(loan.region->start, bytes);
          launch.begin();
          loan.mark = mark(false);
          running.push_back({launch, loan.mark});
          pool.give_back(std::move(loan));
          break;
        }
        case 3: {
          Captured captured{{next_capture++}, {}};
          for (int i = 0; i < 5; ++i) captured.launches.emplace_back(captured.graph.slice(pool, bytes), bytes);
          graphs.push_back(std::move(captured));
          break;
        }
      }
      for (const Captured& captured : graphs) {  // its branches at once
        for (const Launch& launch : captured.launches) launch.begin();
        for (const Launch& launch : captured.launches) launch.end();
      }
      while (running.size() > random() % 6) {
        running.front().launch.end();
        running.front().mark->store(true, std::memory_order_release);
        running.erase(running.begin());
      }
      if (graphs.size() > random() % 5) {
        std::thread([&] { graphs.front().graph.destroy(pool); }).join();
        graphs.erase(graphs.begin());
      }
    }
    for (const Running& one : running) one.launch.end();
  };
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) threads.emplace_back(work, thread);
  for (std::thread& thread : threads) thread.join();
  REQUIRE(world.allocations < 200);
}

}  // namespace
}  // namespace gc::units

int main() {
  using namespace gc::units;
  streams_keep_their_regions_apart();
  a_region_that_has_become_too_small_is_lent_to_nobody();
  two_threads_that_ask_for_one_stream_get_one_region();
  many_streams_are_told_to_borrow();
  a_loan_is_lent_again_when_its_launch_has_ended();
  loans_in_turn_need_no_new_memory();
  launches_of_a_graph_share_nothing();
  graphs_that_come_and_go_need_no_new_memory();
  what_is_cut_up_is_not_given_back_with_another_graph();
  a_graph_that_cannot_hold_a_region_gets_none();
  lack_of_memory_leaves_the_pool_as_it_was();
  regions_come_back_during_calls_that_wait_for_it();
  threads_at_once();
  std::puts("all cases passed");
}
