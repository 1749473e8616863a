// Plans, made once. A call on a small map takes the host longer than the GPU, and a plan is part of that.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/plan/transform_plan.h"

namespace gc::cuda {

// What a plan depends on besides the problem and the device.
struct Planning {
  bool dots_given = false;  // see make_plan
  int late_splits = 0;      // whose partial results the transform that follows can merge
};

// The plan for the device's multiprocessors and shared memory. Throws std::invalid_argument as make_plan does.
Plan planned(KernelKind kind, const Problem& problem, int device, const Planning& planning);

enum class TransformPass : int { kForward, kBackward };

// depth: of the backward pass. merges: it begins with partial results.
TransformPlan planned(TransformPass pass, const TransformProblem& problem, int device, TransformDepth depth,
                      bool merges);

}  // namespace gc::cuda
