#include "cuda/kernels/transform_backward.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

namespace {

// What the plan says of the arguments; and whether the launch begins early.
bool set_planned(const TransformPlan& plan, TransformBackwardArgs& args) {
  args.grid = plan.grid;
  const bool early = plan.paths.has(Path::kEarlyStart);
  for (int b = 0; early && b < args.branches; ++b) {
    const int64_t elements = int64_t{args.branch[b].hidden} * args.channels;
    if (plan.grid.phases > 1) add_prefetch(args.prefetches, args.branch[b].w2, elements, plan.type);
    if (args.grad_context != nullptr) add_prefetch(args.prefetches, args.branch[b].w1, elements, plan.type);
  }
  return early;
}

}  // namespace

cudaError_t launch_transform_backward(const TransformPlan& plan, TransformBackwardArgs args, cudaStream_t stream) {
  const bool early = set_planned(plan, args);
  return dispatch_type(plan.type, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_width<kMaxSlabSteps>(plan.slab_steps, [&](auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      const auto kernel =
          plan.paths.has(Path::kLateMerge) ? merging_transform_backward<T, kSteps> : transform_backward<T, kSteps>;
      return launch(kernel, plan.blocks(), kTransformThreads, plan.shared_bytes, args, stream, early);
    });
  });
}

cudaError_t launch_normalized_transform_backward(const TransformPlan& plan, NormalizedTransformBackwardArgs args,
                                                 cudaStream_t stream) {
  const bool early = set_planned(plan, args);
  return dispatch_type(plan.type, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_width<kMaxSlabSteps>(plan.slab_steps, [&](auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      return launch(normalized_transform_backward<T, kSteps>, plan.blocks(), kTransformThreads, plan.shared_bytes, args,
                    stream, early);
    });
  });
}

}  // namespace gc
