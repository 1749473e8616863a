#include "cuda/launch/planned.h"

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include "cuda/launch/recent.h"

namespace gc::cuda {

namespace {

DeviceLimits limits_of(int device) {
  DeviceLimits limits;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  limits.paths = paths_on(10 * major + minor);
  return limits;
}

// Of a key: another choice of paths makes other plans.
int64_t with_choice(int64_t number) {
  const auto chosen = chosen_paths();
  return number * (int64_t{1} << (kPathCount + 1)) + (chosen ? 1 + 2 * int64_t{chosen->bits} : 0);
}

}  // namespace

Plan planned(KernelKind kind, const Problem& problem, int device, const Planning& planning) {
  static thread_local Recent<8, Plan> plans;
  const Key<8> key{problem.images,
                   problem.channels,
                   problem.pixels,
                   static_cast<int64_t>(problem.layout),
                   static_cast<int64_t>(problem.type),
                   problem.alignment,
                   with_choice((int64_t{planning.late_splits} * kKernelKinds + static_cast<int64_t>(kind)) * 2 +
                               planning.dots_given),
                   device};
  return plans.get(key, [&] {
    DeviceLimits limits = limits_of(device);
    limits.late_splits = planning.late_splits;
    return make_plan(kind, problem, limits, planning.dots_given);
  });
}

TransformPlan planned(TransformPass pass, const TransformProblem& problem, int device, TransformDepth depth,
                      bool merges) {
  static thread_local Recent<8, TransformPlan> plans;
  const Key<8> key{problem.images,
                   problem.channels,
                   problem.branches,
                   problem.hidden[0],
                   problem.hidden[1],
                   static_cast<int64_t>(problem.type) * 2 + problem.pairs,
                   with_choice((static_cast<int64_t>(pass) * 4 + static_cast<int64_t>(depth)) * 2 + merges),
                   device};
  return plans.get(key, [&] {
    DeviceLimits limits = limits_of(device);
    limits.paths = merges ? limits.paths | Path::kLateMerge : limits.paths.without(Path::kLateMerge);
    return pass == TransformPass::kForward ? make_transform_forward_plan(problem, limits)
                                           : make_transform_backward_plan(problem, limits, depth);
  });
}

}  // namespace gc::cuda
