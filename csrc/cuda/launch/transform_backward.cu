#include "cuda/kernels/transform_backward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_transform_backward(const TransformPlan& plan, TransformBackwardArgs args, cudaStream_t stream) {
  args.grid = plan.grid;
  args.early = plan.paths.has(Path::kEarlyStart);
  return dispatch_type(plan.type, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_width<kMaxSlabSteps>(plan.slab_steps, [&](auto steps) {
      return launch(transform_backward<T, decltype(steps)::value>, plan.blocks(), kTransformThreads, plan.shared_bytes,
                    args, stream, args.early);
    });
  });
}

}  // namespace gc
