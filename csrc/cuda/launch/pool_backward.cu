#include "cuda/kernels/pool_backward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pool_backward(const Plan& plan, PoolBackwardArgs args, cudaStream_t stream) {
  using Logits = PoolBackwardTraits<PoolGradient::kLogits>;
  using Mask = PoolBackwardTraits<PoolGradient::kMask>;
  using Block = PoolBackwardTraits<PoolGradient::kBlock>;
  using StagedBlock = PoolBackwardTraits<PoolGradient::kBlock, true>;
  return dispatch<Logits, Mask, Block, StagedBlock>(plan, [&](auto instance) {
    using I = decltype(instance);
    constexpr PoolGradient kGradient = I::Traits::kGradient;
    constexpr bool kStagedGrad = I::Traits::kStagedGrad;
    return launch(pool_backward<typename I::T, I::kLayout, I::kRows, I::kWidth, kGradient, kStagedGrad>, plan, args,
                  stream);
  });
}

}  // namespace gc
