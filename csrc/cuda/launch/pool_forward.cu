#include "cuda/kernels/pool_forward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pool_forward(const Plan& plan, PoolForwardArgs args, cudaStream_t stream) {
  using Mask = PoolForwardTraits<Weighting::kMask>;
  using Logits = PoolForwardTraits<Weighting::kLogits>;
  using Uniform = PoolForwardTraits<Weighting::kUniform>;
  using MaskAhead = PoolForwardTraits<Weighting::kMask, Path::kTilesAhead>;
  using Full = PoolForwardTraits<Weighting::kUniform, Path::kFullMachine>;
  using Narrow = PoolForwardTraits<Weighting::kUniform, Path::kNeighbours>;
  using FullNarrow = PoolForwardTraits<Weighting::kUniform, Path::kFullMachine, Path::kNeighbours>;
  return dispatch<Mask, Logits, Uniform, MaskAhead, Full, Narrow, FullNarrow>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(pool_forward<typename I::T, I::kLayout, I::kRows, I::kWidth, typename I::Traits>, plan, args, stream);
  });
}

}  // namespace gc
