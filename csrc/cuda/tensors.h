// Of tensors, what planning and launching ask.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>

#include "backend.h"
#include "cuda/launch/counters.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/planned.h"

namespace gc::cuda {

inline cudaStream_t stream_of(const FeatureMap& x) {
  return c10::cuda::getCurrentCUDAStream(x.tensor().device().index());
}

inline ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return ElementType::kDouble;
    case at::kHalf:
      return ElementType::kHalf;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    default:
      return ElementType::kFloat;  // check_feature_map lets nothing else pass
  }
}

// maps: every feature map of the launch; their addresses decide on the width of loads and stores.
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
