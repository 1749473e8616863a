#include "cuda/kernels/grad_y.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_grad_y(const Plan& plan, GradYArgs args, cudaStream_t stream) {
  return dispatch<GradYTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(grad_y<typename I::T, I::kLayout, I::kRows, I::kWidth>, plan, args, stream);
  });
}

cudaError_t launch_norm_gradients(ElementType type, NormGradientsArgs args, cudaStream_t stream) {
  return dispatch_type(type, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(norm_gradients<T>, norm_blocks(args.channels), kNormThreads, 0, args, stream, false);
  });
}

}  // namespace gc
