// What the forward pass of the whole block keeps for its backward pass.
#pragma once

#include "ops/branch.h"
#include "ops/map.h"

namespace gc {

// Where each part begins in one tensor of the accumulation type. No gaps, so that all of it is written and two calls
// keep the same bits. gc_cuda/ops/operands.py has the same sizes.
struct Kept {
  int64_t state = 0;          // [N, C + kStatistics]
  int64_t logits;             // [N, S]; none for average pooling
  int64_t normalized;         // [N, P] of add, then of mul: what leaves the layer norms before their weight and bias
  int64_t inverse_deviation;  // [branches, N]
  int64_t scale;              // [N, C]; none without mul
  int64_t elements;

  Kept(const FeatureMap& x, bool attention, const Branches& branches) {
    logits = state + x.images() * (x.channels() + kStatistics);
    normalized = logits + (attention ? x.images() * x.pixels() : 0);
    inverse_deviation = normalized + x.images() * branches.hidden();
    scale = inverse_deviation + x.images() * branches.count();
    elements = scale + (branches.has(kMul) ? x.images() * x.channels() : 0);
  }
};

// The same in memory; each branch's own are null where the branch is absent.
struct KeptParts {
  void *state, *context, *logits, *scale;  // scale: null without mul
  std::array<void*, 2> normalized, inverse_deviation;

  // The state of another map in the place of this one.
  void set_state(void* other, const FeatureMap& x) {
    state = other;
    context = after(other, kStatistics, x.accumulation_bytes());
  }

  KeptParts(void* memory, const Kept& kept, const FeatureMap& x, const Branches& branches) {
    const auto at = [&](int64_t start) { return after(memory, start, x.accumulation_bytes()); };
    state = at(kept.state);
    context = at(kept.state + kStatistics);  // an image's follows the statistics of its state
    logits = at(kept.logits);
    scale = branches.has(kMul) ? at(kept.scale) : nullptr;
    for (const int b : {kAdd, kMul}) {
      const bool has = branches.has(b);
      normalized[b] = has ? at(kept.normalized + branches.hidden_before(b) * x.images()) : nullptr;
      inverse_deviation[b] = has ? at(kept.inverse_deviation + branches.row(b) * x.images()) : nullptr;
    }
  }
};

}  // namespace gc
