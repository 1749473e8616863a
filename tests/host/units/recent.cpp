// What a function returned for the arguments that it had lately.
#include "cuda/launch/recent.h"

#include <stdexcept>

#include "check.h"

namespace gc::units {
namespace {

using cuda::Key;
using cuda::Recent;

void a_key_is_computed_once() {
  Recent<2, int> recent;
  int calls = 0;
  const auto get = [&](int64_t a, int64_t b) {
    return recent.get({a, b}, [&] {
      ++calls;
      return static_cast<int>(10 * a + b);
    });
  };
  REQUIRE(get(1, 2) == 12);
  REQUIRE(get(1, 2) == 12);
  REQUIRE(calls == 1);
  REQUIRE(get(2, 1) == 21);
  REQUIRE(get(0, 0) == 0);
  REQUIRE(get(1, 2) == 12);
  REQUIRE(calls == 3);
}

// Whatever places they share: four places, a hundred keys, each number of a key alone different.
void no_key_gets_the_value_of_another() {
  Recent<2, int64_t, 4> recent;
  for (int round = 0; round < 3; ++round) {
    for (int64_t a = -5; a < 5; ++a) {
      for (int64_t b = -5; b < 5; ++b) {
        REQUIRE(recent.get({a, b}, [&] { return 100 * a + b; }) == 100 * a + b);
        REQUIRE(recent.get({a, b}, [] { return int64_t{-1}; }) == 100 * a + b);
      }
    }
  }
}

void what_is_thrown_is_not_remembered() {
  Recent<1, int> recent;
  for (int i = 0; i < 2; ++i) {
    bool thrown = false;
    try {
      recent.get({7}, []() -> int { throw std::invalid_argument("too large"); });
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    REQUIRE(thrown);
  }
  REQUIRE(recent.get({7}, [] { return 3; }) == 3);
}

// The shapes of a network mostly have places of their own.
void a_network_finds_its_plans_again() {
  Recent<4, int> recent;
  int calls = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t stage = 0; stage < 4; ++stage) {
      for (int64_t kernel = 0; kernel < 5; ++kernel) {
        recent.get({2, 256 << stage, 40000 >> 2 * stage, kernel}, [&] { return ++calls; });
      }
    }
  }
  REQUIRE(calls <= 26);
}

}  // namespace
}  // namespace gc::units

int main() {
  using namespace gc::units;
  a_key_is_computed_once();
  no_key_gets_the_value_of_another();
  what_is_thrown_is_not_remembered();
  a_network_finds_its_plans_again();
  std::puts("all cases passed");
}
