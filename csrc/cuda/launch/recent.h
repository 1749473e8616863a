// Results of a function, remembered for the arguments that it had lately.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace gc::cuda {

template <size_t kNumbers>
using Key = std::array<int64_t, kNumbers>;

// Each key has one place, which it shares with others: the later one stays. For one thread; 128 places are enough for
// the launches of a network, which has a few shapes with some launches each.
template <size_t kNumbers, typename Value, size_t kPlaces = 128>
class Recent {
 public:
  // make(), or what it returned for this key before. What it throws is not remembered.
  template <typename Make>
  const Value& get(const Key<kNumbers>& key, const Make& make) {
    std::unique_ptr<Entry>& entry = entries_[place_of(key)];
    if (entry == nullptr || entry->key != key) entry = std::make_unique<Entry>(Entry{key, make()});
    return entry->value;
  }

 private:
  struct Entry {
    Key<kNumbers> key;
    Value value;
  };

  static size_t place_of(const Key<kNumbers>& key) {
    uint64_t mixed = 0;
    for (const int64_t number : key) mixed = (mixed ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15u;
    return mixed >> 32 & (kPlaces - 1);
  }

  static_assert((kPlaces & (kPlaces - 1)) == 0, "a power of two");
  std::array<std::unique_ptr<Entry>, kPlaces> entries_;
};

}  // namespace gc::cuda
