#include "cuda/kernels/pool_forward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pool_forward(const Plan& plan, PoolForwardArgs args, cudaStream_t stream) {
  return dispatch(plan, [&](auto type, auto layout, auto width) {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int kWidth = decltype(width)::value;
    switch (plan.kind) {
      case KernelKind::kPoolMask:
        if constexpr (has_tall_tiles<T, kLayout>) {
          if (plan.rows == 16)
            return launch(pool_forward<T, kLayout, 16, kWidth, Weighting::kMask>, plan, args, stream);
        }
        return launch(pool_forward<T, kLayout, 8, kWidth, Weighting::kMask>, plan, args, stream);
      case KernelKind::kPoolLogits:
        return launch(pool_forward<T, kLayout, 8, kWidth, Weighting::kLogits>, plan, args, stream);
      case KernelKind::kPoolUniform:
        return launch(pool_forward<T, kLayout, 8, kWidth, Weighting::kUniform>, plan, args, stream);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace gc
