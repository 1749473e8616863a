#include "cuda/kernels/pool_backward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pool_backward(const Plan& plan, PoolBackwardArgs args, cudaStream_t stream) {
  using Logits = PoolBackwardTraits<PoolGradient::kLogits>;
  using Mask = PoolBackwardTraits<PoolGradient::kMask>;
  using Block = PoolBackwardTraits<PoolGradient::kBlock>;
  using StagedBlock = PoolBackwardTraits<PoolGradient::kBlock, Path::kStagedGrad>;
  return dispatch<Logits, Mask, Block, StagedBlock>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(pool_backward<typename I::T, I::kLayout, I::kRows, I::kWidth, typename I::Traits>, plan, args,
                  stream);
  });
}

cudaError_t launch_normalized_pool_backward(const Plan& plan, NormalizedPoolBackwardArgs args, cudaStream_t stream) {
  return dispatch<NormalizedPoolBackwardTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(pool_backward<typename I::T, I::kLayout, I::kRows, I::kWidth, typename I::Traits>, plan, args,
                  stream);
  });
}

}  // namespace gc
