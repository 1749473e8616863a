#include "cuda/kernels/transform_forward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_transform_forward(const TransformPlan& plan, TransformForwardArgs args, cudaStream_t stream) {
  args.grid = plan.grid;
  args.early = plan.paths.has(Path::kEarlyStart);
  args.tile_images = plan.tile_images;
  args.shares[0] = plan.shares[0];
  args.shares[1] = plan.shares[1];
  return dispatch_type(plan.type, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_width<2>(plan.width, [&](auto width) {
      return launch(transform_forward<T, decltype(width)::value>, plan.blocks(), kTransformThreads, plan.shared_bytes,
                    args, stream, args.early);
    });
  });
}

}  // namespace gc
