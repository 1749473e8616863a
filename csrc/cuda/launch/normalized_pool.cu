#include "cuda/kernels/normalized_pool.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_normalized_pool(const Plan& plan, NormalizedPoolArgs args, cudaStream_t stream) {
  using Mask = NormalizedPoolTraits<Weighting::kMask>;
  using Logits = NormalizedPoolTraits<Weighting::kLogits>;
  using Uniform = NormalizedPoolTraits<Weighting::kUniform>;
  return dispatch<Mask, Logits, Uniform>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(pool_forward<typename I::T, I::kLayout, I::kRows, I::kWidth, typename I::Traits>, plan, args, stream);
  });
}

cudaError_t launch_normalized_pixel_dot(const Plan& plan, NormalizedPixelDotArgs args, cudaStream_t stream) {
  return dispatch<NormalizedPixelDotTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(pixel_dot<typename I::T, I::kLayout, I::kRows, I::kWidth, NormalizedPixelDotTraits>, plan, args,
                  stream);
  });
}

}  // namespace gc
