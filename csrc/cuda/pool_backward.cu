#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "kernels/pool_backward.h"

namespace gc {

cudaError_t launch_pool_backward(const Plan& plan, PoolBackwardArgs args, cudaStream_t stream) {
  return dispatch(plan, [&](auto type, auto layout, auto width) {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int kWidth = decltype(width)::value;
    const auto with_mask = [&](auto mask) {
      constexpr bool kMask = decltype(mask)::value;
      if constexpr (has_tall_tiles<T, kLayout>) {
        if (plan.rows == 16) return launch(pool_backward<T, kLayout, 16, kWidth, kMask>, plan, args, stream);
      }
      return launch(pool_backward<T, kLayout, 8, kWidth, kMask>, plan, args, stream);
    };
    switch (plan.kind) {
      case KernelKind::kPoolBackwardMask:
        return with_mask(Constant<true>{});
      case KernelKind::kPoolBackwardLogits:
        return with_mask(Constant<false>{});
      default:
        return cudaErrorInvalidValue;
    }
  });
}

}  // namespace gc
