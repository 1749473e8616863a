#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "kernels/broadcast.h"

namespace gc {

cudaError_t launch_broadcast(const Plan& plan, BroadcastArgs args, cudaStream_t stream) {
  return dispatch(plan, [&](auto type, auto layout, auto width) {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    constexpr int kWidth = decltype(width)::value;
    if (args.scale.data == nullptr) return launch(broadcast<T, kLayout, 8, kWidth, false, true>, plan, args, stream);
    if (args.term.data == nullptr) return launch(broadcast<T, kLayout, 8, kWidth, true, false>, plan, args, stream);
    return launch(broadcast<T, kLayout, 8, kWidth, true, true>, plan, args, stream);
  });
}

cudaError_t launch_broadcast_mul_backward(const Plan& plan, BroadcastMulBackwardArgs args, cudaStream_t stream) {
  return dispatch(plan, [&](auto type, auto layout, auto width) {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    return launch(broadcast_mul_backward<T, kLayout, 4, decltype(width)::value>, plan, args, stream);
  });
}

}  // namespace gc
