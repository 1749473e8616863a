#include "cuda/kernels/broadcast.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

namespace {

// kScale, kTerm: which of the two vectors there are.
template <bool kScale, bool kTerm>
cudaError_t launch_with(const Plan& plan, const BroadcastArgs& args, cudaStream_t stream) {
  if (plan.flat) {
    return dispatch_flat<BroadcastTraits<>, BroadcastTraits<Path::kFullMachine>>(plan, [&](auto flat) {
      using I = decltype(flat);
      return launch(broadcast_flat<typename I::T, I::Traits::kFlatRows, kScale, kTerm, typename I::Traits>, plan, args,
                    stream);
    });
  }
  return dispatch<BroadcastTraits<>>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(broadcast<typename I::T, I::kLayout, I::kRows, I::kWidth, kScale, kTerm>, plan, args, stream);
  });
}

}  // namespace

cudaError_t launch_broadcast(const Plan& plan, BroadcastArgs args, cudaStream_t stream) {
  if (args.scale.data == nullptr) return launch_with<false, true>(plan, args, stream);
  if (args.term.data == nullptr) return launch_with<true, false>(plan, args, stream);
  return launch_with<true, true>(plan, args, stream);
}

cudaError_t launch_broadcast_mul_backward(const Plan& plan, BroadcastMulBackwardArgs args, cudaStream_t stream) {
  return dispatch<BroadcastMulBackwardTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(broadcast_mul_backward<typename I::T, I::kLayout, I::kRows, I::kWidth>, plan, args, stream);
  });
}

}  // namespace gc
