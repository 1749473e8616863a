// The small steps of the residual tail on vectors of the channels, for which a call of with_norm allocates.
#pragma once

#include <algorithm>

#include "cpu/norm.h"

namespace gc::cpu {

// Calls body(T{}, NormVectors, NormMemory) with memory that it allocates: of a few vectors of the channels.
template <typename Body>
void with_norm(const FeatureMap& y, const Norm& norm, const Body& body) {
  const Wanted wanted = wanted_by<NormMemory>(y);
  const Tensor memory = y.empty_accumulation({wanted.workspace});
  const auto step = [&](auto zero, const auto& taken) {
    body(zero, NormVectors<decltype(zero)>(norm, y.channels(), taken));
  };
  with_memory<NormMemory>({memory.data_ptr(), nullptr}, step, y);
}

// The state of x from that of y - mean: context = slope * context + bias.
inline void contexts(const FeatureMap& y, const Norm& norm, const void* state, void* of_x) {
  with_norm(y, norm, [&](auto zero, const auto& vectors) {
    using A = acc_t<decltype(zero)>;
    normalize_contexts(vectors, y.images(), y.channels(), static_cast<const A*>(state), static_cast<A*>(of_x));
  });
}

}  // namespace gc::cpu
