// Plans for tensors.
#pragma once

#include <initializer_list>

#include "cuda/tensors.h"

namespace gc::cuda {

// maps: every feature map of the launch, or null; their addresses decide on the width of loads and stores.
inline Plan plan_for(KernelKind kind, const FeatureMap& x, std::initializer_list<const void*> maps,
                     const Planning& planning = {}) {
  Problem problem{};
  problem.images = x.images();
  problem.channels = x.channels();
  problem.pixels = x.pixels();
  problem.layout = x.channels_last() ? Layout::kNHWC : Layout::kNCHW;
  problem.type = element_type(x.type());
  for (const void* map : maps) {
    while (reinterpret_cast<uintptr_t>(map) % problem.alignment != 0) problem.alignment /= 2;
  }
  try {
    return planned(kind, problem, x.tensor().device().index(), planning);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "x of shape ", x.tensor().sizes(), " is too large: ", error.what());
  }
}

}  // namespace gc::cuda
