// The operators' own bodies on meta tensors: what they demand and what they return, with passes that compute nothing.
#include "ops/operators.h"

namespace {

using namespace gc;

struct Pass {
  template <typename... Given>
  explicit Pass(const Given&...) {}
  static Wanted wanted() { return {1, 1}; }
  static Unmerged left() { return {}; }
  template <typename Call>
  static void launch(const Call&, Lent) {}
};

struct Dry {
  using PoolForward = Pass;
  using PoolBackward = Pass;
  using BroadcastBackward = Pass;
  using TransformForward = Pass;
  using TransformBackward = Pass;

  struct Counters {
    Counters(int64_t, const FeatureMap&) {}
    static unsigned* get() { return nullptr; }
  };

  static Tensor empty_output(const FeatureMap& x) { return at::empty(x.tensor().sizes(), x.like()); }
  static void broadcast(const FeatureMap&, const BroadcastCall&) {}
};

}  // namespace

_TORCH_LIBRARY_IMPL(gc_cuda, Meta, m, C10_UID) { ops::register_operators<Dry>(m); }
