#include "cuda/kernels/pool_backward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pool_backward(const Plan& plan, PoolBackwardArgs args, cudaStream_t stream) {
  return dispatch(plan, [&](auto type, auto layout, auto width) {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int kWidth = decltype(width)::value;
    const auto with_gradient = [&](auto gradient) {
      constexpr PoolGradient kGradient = decltype(gradient)::value;
      if constexpr (has_tall_tiles<T, kLayout>) {
        if (plan.rows == 16) return launch(pool_backward<T, kLayout, 16, kWidth, kGradient>, plan, args, stream);
      }
      return launch(pool_backward<T, kLayout, 8, kWidth, kGradient>, plan, args, stream);
    };
    switch (plan.kind) {
      case KernelKind::kPoolBackwardLogits:
        return with_gradient(Constant<PoolGradient::kLogits>{});
      case KernelKind::kPoolBackwardMask:
        return with_gradient(Constant<PoolGradient::kMask>{});
      case KernelKind::kPoolBackwardBlock:
        return with_gradient(Constant<PoolGradient::kBlock>{});
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace gc
