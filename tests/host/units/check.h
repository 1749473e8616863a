// What the programs of this folder share: each runs all of its cases and says which requirement was not met.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace gc::units {

inline void require(bool met, const char* what, int line) {
  if (met) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  std::fflush(stderr);
  std::_Exit(1);  // at once: other threads may be waiting for this one
}

}  // namespace gc::units

#define REQUIRE(condition) ::gc::units::require((condition), #condition, __LINE__)
