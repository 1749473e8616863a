#include "cuda/kernels/residual.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_residual(const Plan& plan, ResidualArgs args, cudaStream_t stream) {
  if (plan.flat) {
    return dispatch_flat<ResidualTraits>(plan, [&](auto flat) {
      using I = decltype(flat);
      return launch(residual_flat<typename I::T, ResidualTraits::kFlatRows>, plan, args, stream);
    });
  }
  return dispatch<ResidualTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(residual<typename I::T, I::kLayout, I::kRows, I::kWidth>, plan, args, stream);
  });
}

}  // namespace gc
