#include "cuda/kernels/pool_forward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pool_forward(const Plan& plan, PoolForwardArgs args, cudaStream_t stream) {
  using Mask = PoolForwardTraits<Weighting::kMask>;
  using Logits = PoolForwardTraits<Weighting::kLogits>;
  using Uniform = PoolForwardTraits<Weighting::kUniform>;
  using MaskAhead = PoolForwardTraits<Weighting::kMask, true>;
  return dispatch<Mask, Logits, Uniform, MaskAhead>(plan, [&](auto instance) {
    using I = decltype(instance);
    constexpr Weighting kWeighting = I::Traits::kWeighting;
    constexpr bool kTilesAhead = I::Traits::kTilesAhead;
    return launch(pool_forward<typename I::T, I::kLayout, I::kRows, I::kWidth, kWeighting, kTilesAhead>, plan, args,
                  stream);
  });
}

}  // namespace gc
