// Memory of one call, beside its results.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "backend.h"

namespace gc::ops {

// All that a call needs on the way, in one allocation, in elements of the accumulation type.
class Scratch {
 public:
  explicit Scratch(const FeatureMap& x) : x_(x) {}

  // Runs lay_out, which takes everything, twice: the first time only counts.
  template <typename LayOut>
  void allocate(const LayOut& lay_out) {
    lay_out();
    if (taken_ == 0) return;
    memory_ = x_.empty_accumulation({taken_});
    start_ = memory_.data_ptr();
    taken_ = 0;
    lay_out();
  }

  void* take(int64_t elements) {
    void* const taken = after(start_, taken_, x_.accumulation_bytes());
    taken_ += (elements + kAligned - 1) / kAligned * kAligned;
    return taken;
  }

 private:
  static constexpr int64_t kAligned = 64;  // no two of those that take write one line of a cache

  const FeatureMap& x_;
  Tensor memory_;
  void* start_ = nullptr;
  int64_t taken_ = 0;
};

// [rows, count] of the accumulation type, where those are that a call computes with.
inline Tensor view_of(const FeatureMap& x, void* start, int64_t rows, int64_t count) {
  return at::from_blob(start, {rows, count}, x.tensor().options().dtype(accumulation_type(x.type())));
}

// A pass that is a call of its own.
template <typename Device, typename Pass, typename Call>
void launch_alone(const FeatureMap& x, const Pass& pass, const Call& call) {
  const Wanted wanted = pass.wanted();
  Scratch scratch(x);
  void* workspace = nullptr;
  scratch.allocate([&] { workspace = scratch.take(wanted.workspace); });
  const typename Device::Counters counters(wanted.counters, x);
  pass.launch(call, {workspace, counters.get()});
}

}  // namespace gc::ops
