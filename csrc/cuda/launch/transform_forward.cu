#include "cuda/kernels/transform_forward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_transform_forward(const TransformPlan& plan, TransformForwardArgs args, cudaStream_t stream) {
  args.grid = plan.grid;
  args.tile_images = plan.tile_images;
  args.shares[0] = plan.shares[0];
  args.shares[1] = plan.shares[1];
  const bool early = plan.paths.has(Path::kEarlyStart);
  for (int b = 0; early && b < args.branches; ++b) {
    const int64_t elements = int64_t{args.branch[b].hidden} * args.channels;
    add_prefetch(args.prefetches, args.branch[b].w1, elements, plan.type);
    add_prefetch(args.prefetches, args.branch[b].w2, elements, plan.type);
  }
  return dispatch_type(plan.type, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_width<2>(plan.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const auto kernel =
          plan.paths.has(Path::kLateMerge) ? merging_transform_forward<T, kWidth> : transform_forward<T, kWidth>;
      return launch(kernel, plan.blocks(), kTransformThreads, plan.shared_bytes, args, stream, early);
    });
  });
}

}  // namespace gc
