// What a call of global_context_backward wants.
#pragma once

#include <array>

#include "ops/branch.h"

namespace gc {

// Which gradients a call of global_context_backward wants, numbered as the operator's argument, and what follows: which
// intermediate gradients it takes.
struct Needs {
  static constexpr int kX = 0;
  static constexpr int kMaskWeight = 1;
  static constexpr int kMaskBias = 2;
  static constexpr int kCount = 3 + 2 * kParameters;
  static int index(int branch, Parameter which) { return 3 + kParameters * branch + which; }

  std::array<bool, kCount> needed;
  bool attention;  // else average pooling

  bool x() const { return needed[kX]; }
  bool mask_weight() const { return needed[kMaskWeight]; }
  bool mask_bias() const { return needed[kMaskBias]; }
  bool parameter(int b, Parameter which) const { return needed[index(b, which)]; }
  bool context() const { return x() || mask_weight(); }
  bool hidden(int b) const { return context() || parameter(b, kW1) || parameter(b, kB1); }
  bool activated(int b) const { return hidden(b) || parameter(b, kNormWeight) || parameter(b, kNormBias); }
  bool branch(const Branches& branches, int b) const {
    return branches.has(b) && (activated(b) || parameter(b, kW2) || parameter(b, kB2));
  }
  // Whether the feature map itself is read, and not the gradient alone.
  bool reads_x(const Branches& branches) const { return branch(branches, kMul) || (attention && context()); }
};

}  // namespace gc
