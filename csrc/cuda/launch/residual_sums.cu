#include "cuda/kernels/residual_sums.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_residual_sums(const Plan& plan, ResidualSumsArgs args, cudaStream_t stream) {
  return dispatch<ResidualSumsTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(residual_sums<typename I::T, I::kLayout, I::kRows, I::kWidth>, plan, args, stream);
  });
}

}  // namespace gc
