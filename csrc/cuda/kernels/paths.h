// Newer paths: ways of doing a part of a launch, each beside the one that was measured on a GPU. A plan takes one only
// where it is switched on (plan/paths.h), so kernels, plans and launches name them alike.
#pragma once

#include "geometry.h"

namespace gc {

enum class Path : unsigned {
  kStagedGrad = 1 << 0,   // pool_backward: grad comes through shared memory, together with the tile of x
  kTilesAhead = 1 << 1,   // pool_forward with a mask: the next tile comes while this one is worked on
  kLateMerge = 1 << 2,    // the sums over pixels leave partial results, and the transform merges them
  kEarlyStart = 1 << 3,   // a launch begins while the one before it ends
  kFullMachine = 1 << 4,  // pool_forward without weights: as many blocks as are resident at once
  kNeighbours = 1 << 5,   // the same: neighbouring threads read neighbouring pieces of a row of narrow loads
  kTail = 1 << 6,         // the residual tail by kernels, and not by PyTorch's operators
  kAround = 1 << 7,       // pooling and broadcast around a middle that is PyTorch's, and not the module's own forward
};
inline constexpr int kPathCount = 8;

// A set of them.
struct Paths {
  unsigned bits = 0;

  constexpr Paths() = default;
  GC_BOTH Paths(Path path) : bits(static_cast<unsigned>(path)) {}
  template <typename... Others>
  GC_BOTH Paths(Path path, Others... others) : bits(static_cast<unsigned>(path) | Paths(others...).bits) {}
  GC_BOTH bool has(Path path) const { return (bits & static_cast<unsigned>(path)) != 0; }
  GC_BOTH bool within(Paths others) const { return (bits & ~others.bits) == 0; }
  GC_BOTH Paths operator|(Paths other) const {
    Paths both;
    both.bits = bits | other.bits;
    return both;
  }
  GC_BOTH Paths without(Paths others) const {
    Paths rest;
    rest.bits = bits & ~others.bits;
    return rest;
  }
  GC_BOTH bool operator==(Paths other) const { return bits == other.bits; }
};

}  // namespace gc
