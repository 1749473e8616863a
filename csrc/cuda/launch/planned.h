// Plans, made once. A call on a small map takes the host longer than the GPU, and a plan is part of that.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/plan/transform_plan.h"

namespace gc::cuda {

// The plan for the device's multiprocessors and shared memory. Throws std::invalid_argument as make_plan does.
Plan planned(KernelKind kind, const Problem& problem, int device, bool dots_given);

enum class TransformPass : int { kForward, kBackward };

// depth: of the backward pass.
TransformPlan planned(TransformPass pass, const TransformProblem& problem, int device, TransformDepth depth);

}  // namespace gc::cuda
