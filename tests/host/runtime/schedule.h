// In which order the fibers of a launch run: a schedule is an order and a seed, and the same one gives the same run.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace gc::host {

enum class Order {
  kAscending,   // one block after the other, threads from the first
  kReverse,     // one block after the other from the last, threads from the last
  kRandom,      // several blocks in flight, any fiber that can run
  kStarvation,  // the same, but some warps run only when nothing else can
};

struct Schedule {
  Order order = Order::kAscending;
  unsigned seed = 0;

  // Fresh memory holds NaN under even seeds and 0 under odd ones: each hides bugs that the other shows.
  unsigned char poison() const { return seed % 2 == 0 ? 0xff : 0x00; }
};

std::string name_of(const Schedule& schedule);     // "random:3"
Schedule schedule_named(const std::string& name);  // throws std::invalid_argument

// Every order, with both poisons for the two random ones.
std::vector<Schedule> all_schedules();

// The fibers that can run, numbered by place, and the schedule's choice among them.
class ReadySet {
 public:
  ReadySet(const Schedule& schedule, int places);

  bool empty() const { return items_.empty(); }
  void add(int place);
  int take();  // the fiber to run next; the set must not be empty

  // A new block has come to these places: who starves is drawn anew.
  void new_block(int first_place, int count);

 private:
  int first() const;
  int last() const;
  int any();
  void remove(int place);

  Order order_;
  std::mt19937 random_;
  std::vector<int> items_;
  std::vector<int> position_;        // of a place in items_, or -1
  std::vector<std::uint64_t> bits_;  // the same set by place, for first() and last()
  std::vector<bool> starved_;
};

}  // namespace gc::host
