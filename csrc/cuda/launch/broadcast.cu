#include "cuda/kernels/broadcast.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

namespace {

// Calls body(Constant<scale>, Constant<term>) with what is there.
template <typename Body>
cudaError_t dispatch_present(const BroadcastArgs& args, const Body& body) {
  if (args.scale.data == nullptr) return body(Constant<false>{}, Constant<true>{});
  if (args.term.data == nullptr) return body(Constant<true>{}, Constant<false>{});
  return body(Constant<true>{}, Constant<true>{});
}

}  // namespace

cudaError_t launch_broadcast(const Plan& plan, BroadcastArgs args, cudaStream_t stream) {
  return dispatch_present(args, [&](auto scale, auto term) {
    constexpr bool kScale = decltype(scale)::value, kTerm = decltype(term)::value;
    if (plan.flat) {
      return dispatch_type(plan.type, [&](auto type) {
        return launch(broadcast_flat<typename decltype(type)::type, 8, kScale, kTerm>, plan, args, stream);
      });
    }
    return dispatch(plan, [&](auto type, auto layout, auto width) {
      constexpr Layout kLayout = decltype(layout)::value;
      return launch(broadcast<typename decltype(type)::type, kLayout, 8, decltype(width)::value, kScale, kTerm>, plan,
                    args, stream);
    });
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
