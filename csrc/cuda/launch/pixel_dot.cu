#include "cuda/kernels/pixel_dot.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_pixel_dot(const Plan& plan, PixelDotArgs args, cudaStream_t stream) {
  return dispatch(plan, [&](auto type, auto layout, auto width) {
    using T = typename decltype(type)::type;
    constexpr Layout kLayout = decltype(layout)::value;
    return launch(pixel_dot<T, kLayout, 8, decltype(width)::value>, plan, args, stream);
  });
}

}  // namespace gc
