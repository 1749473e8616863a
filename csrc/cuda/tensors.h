// Of tensors, what planning and launching ask.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

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

}  // namespace gc::cuda
