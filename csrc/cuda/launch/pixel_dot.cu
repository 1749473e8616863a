#include "cuda/kernels/pixel_dot.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pixel_dot(const Plan& plan, PixelDotArgs args, cudaStream_t stream) {
  return dispatch<PixelDotTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(pixel_dot<typename I::T, I::kLayout, I::kRows, I::kWidth, PixelDotTraits>, plan, args, stream);
  });
}

}  // namespace gc
