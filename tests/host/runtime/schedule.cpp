#include "schedule.h"

#include <stdexcept>

namespace gc::host {
namespace {

struct Named {
  Order order;
  const char* name;
};
constexpr Named kOrders[] = {
    {Order::kAscending, "ascending"},
    {Order::kReverse, "reverse"},
    {Order::kRandom, "random"},
    {Order::kStarvation, "starvation"},
};

constexpr int kStarvedUnit = 32;  // a warp
constexpr int kTries = 8;

}  // namespace

std::string name_of(const Schedule& schedule) {
  for (const Named& named : kOrders) {
    if (named.order == schedule.order) return std::string(named.name) + ":" + std::to_string(schedule.seed);
  }
  throw std::invalid_argument("a schedule of no known order");
}

Schedule schedule_named(const std::string& name) {
  const std::size_t colon = name.find(':');
  for (const Named& named : kOrders) {
    if (name.substr(0, colon) != named.name) continue;
    Schedule schedule{named.order, 0};
    if (colon != std::string::npos) schedule.seed = static_cast<unsigned>(std::stoul(name.substr(colon + 1)));
    return schedule;
  }
  throw std::invalid_argument("no schedule is called '" + name +
                              "': expected ascending, reverse, random or starvation, " +
                              "and perhaps a seed, as in random:3");
}

std::vector<Schedule> all_schedules() {
  return {{Order::kAscending, 0}, {Order::kReverse, 1},    {Order::kRandom, 2},
          {Order::kRandom, 3},    {Order::kStarvation, 4}, {Order::kStarvation, 5}};
}

ReadySet::ReadySet(const Schedule& schedule, int places)
    : order_(schedule.order),
      random_(schedule.seed),
      position_(places, -1),
      bits_((places + 63) / 64, 0),
      starved_(places, false) {}

void ReadySet::add(int place) {
  position_[place] = static_cast<int>(items_.size());
  items_.push_back(place);
  bits_[place / 64] |= std::uint64_t{1} << (place % 64);
}

void ReadySet::remove(int place) {
  const int hole = position_[place];
  items_[hole] = items_.back();
  position_[items_[hole]] = hole;
  items_.pop_back();
  position_[place] = -1;
  bits_[place / 64] &= ~(std::uint64_t{1} << (place % 64));
}

int ReadySet::take() {
  int place = 0;
  switch (order_) {
    case Order::kAscending:
      place = first();
      break;
    case Order::kReverse:
      place = last();
      break;
    case Order::kRandom:
    case Order::kStarvation:
      place = any();
      break;
  }
  remove(place);
  return place;
}

void ReadySet::new_block(int first_place, int count) {
  if (order_ != Order::kStarvation) return;
  const bool whole_block = random_() % 4 == 0;
  for (int begin = 0; begin < count; begin += kStarvedUnit) {
    const bool starved = whole_block || random_() % 3 == 0;
    for (int i = begin; i < count && i < begin + kStarvedUnit; ++i) starved_[first_place + i] = starved;
  }
}

int ReadySet::first() const {
  std::size_t word = 0;
  while (bits_[word] == 0) ++word;
  return static_cast<int>(word * 64) + __builtin_ctzll(bits_[word]);
}

int ReadySet::last() const {
  std::size_t word = bits_.size() - 1;
  while (bits_[word] == 0) --word;
  return static_cast<int>(word * 64) + 63 - __builtin_clzll(bits_[word]);
}

// Uniform; under starvation the starved are taken only if a few draws find nobody else.
int ReadySet::any() {
  int place = items_[random_() % items_.size()];
  for (int i = 0; i < kTries && starved_[place]; ++i) place = items_[random_() % items_.size()];
  if (!starved_[place]) return place;
  for (const int item : items_) {
    if (!starved_[item]) return item;
  }
  return place;
}

}  // namespace gc::host
