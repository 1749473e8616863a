#include "cuda/kernels/residual.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

namespace {

template <bool kIdentity>
cudaError_t launch_with(const Plan& plan, const ResidualArgs& args, cudaStream_t stream) {
  if (plan.flat) {
    return dispatch_flat<ResidualTraits>(plan, [&](auto flat) {
      using I = decltype(flat);
      return launch(residual_flat<typename I::T, ResidualTraits::kFlatRows, kIdentity>, plan, args, stream);
    });
  }
  return dispatch<ResidualTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(residual<typename I::T, I::kLayout, I::kRows, I::kWidth, kIdentity>, plan, args, stream);
  });
}

}  // namespace

cudaError_t launch_residual(const Plan& plan, ResidualArgs args, cudaStream_t stream) {
  return args.identity != nullptr ? launch_with<true>(plan, args, stream) : launch_with<false>(plan, args, stream);
}

}  // namespace gc
