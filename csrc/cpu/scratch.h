// Memory of one pass, and the copies of small vectors in the accumulation type.
#pragma once

#include <algorithm>
#include <type_traits>

#include "backend.h"
#include "cpu/dispatch.h"

namespace gc::cpu {

// Hands out arrays of one block of memory. Without the block it counts what they take.
template <typename A>
class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : memory_(static_cast<A*>(memory)) {}

  A* take(int64_t count) {
    A* const taken = memory_ ? memory_ + taken_ : nullptr;
    taken_ += divide_up(count, kLine) * kLine;
    return taken;
  }

  int64_t taken() const { return taken_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);  // no two arrays share a cache line

  A* memory_;
  int64_t taken_ = 0;
};

// What the pass's memory takes: Memory<T> takes its arrays when it is made.
template <template <typename> class Memory, typename... Given>
Wanted wanted_by(const FeatureMap& x, const Given&... given) {
  if (x.images() == 0) return {};
  return dispatch(x.type(), [&](auto zero) {
    Scratch<acc_t<decltype(zero)>> counted;
    Memory<decltype(zero)>(x, given..., counted);
    return Wanted{counted.taken(), 0};
  });
}

// Calls body(T{}, the pass's memory), if there is anything to compute.
template <template <typename> class Memory, typename Body, typename... Given>
void with_memory(const Lent& lent, const Body& body, const FeatureMap& x, const Given&... given) {
  if (x.images() == 0) return;
  dispatch(x.type(), [&](auto zero) {
    Scratch<acc_t<decltype(zero)>> scratch(lent.workspace);
    body(zero, Memory<decltype(zero)>(x, given..., scratch));
  });
}

// A vector may be in T, while kernels take and give the accumulation type. Where these differ it has a copy.

template <typename T>
inline constexpr bool kHasCopies = !std::is_same_v<T, acc_t<T>>;

template <typename T>
acc_t<T>* take_copy(Scratch<acc_t<T>>& scratch, int64_t count) {
  return kHasCopies<T> ? scratch.take(count) : nullptr;
}

// The vector itself or, where it is in T, its copy.
template <typename T>
const acc_t<T>* widen(Companion vector, int64_t count, acc_t<T>* copy) {
  if (vector.data == nullptr) return nullptr;
  if (!kHasCopies<T> || vector.wide) return static_cast<const acc_t<T>*>(vector.data);
  kernels<T>().widen(static_cast<const T*>(vector.data), copy, count);
  return copy;
}

// Where a result is computed: in its place or, where it is in T, in a copy that narrow() puts there. Null if absent.
template <typename T>
acc_t<T>* computed_in(CompanionOut result, acc_t<T>* copy) {
  if (result.data == nullptr) return nullptr;
  return !kHasCopies<T> || result.wide ? static_cast<acc_t<T>*>(result.data) : copy;
}

template <typename T>
void narrow(const acc_t<T>* copy, CompanionOut result, int64_t count) {
  if (result.data == nullptr || !kHasCopies<T> || result.wide) return;
  kernels<T>().narrow(copy, static_cast<T*>(result.data), count);
}

}  // namespace gc::cpu
