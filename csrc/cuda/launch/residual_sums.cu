#include "cuda/kernels/residual_sums.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

namespace {

template <bool kMasks, bool kProducts>
cudaError_t launch_with(const Plan& plan, const ResidualSumsArgs& args, cudaStream_t stream) {
  return dispatch<ResidualSumsTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(residual_sums<typename I::T, I::kLayout, I::kRows, I::kWidth, kMasks, kProducts>, plan, args, stream);
  });
}

}  // namespace

cudaError_t launch_residual_sums(const Plan& plan, ResidualSumsArgs args, cudaStream_t stream) {
  if (args.y == nullptr) {
    return args.out == nullptr ? launch_with<false, false>(plan, args, stream)
                               : launch_with<true, false>(plan, args, stream);
  }
  return args.out == nullptr ? launch_with<false, true>(plan, args, stream)
                             : launch_with<true, true>(plan, args, stream);
}

}  // namespace gc
