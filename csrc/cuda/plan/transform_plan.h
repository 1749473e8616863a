// Launch plans of the transform, the small matrix products between pooling and broadcast. As plan.h: computed on the
// host, printable, without torch and the CUDA runtime.
#pragma once

#include <string>

#include "cuda/kernels/args.h"
#include "cuda/plan/plan.h"

namespace gc {

struct TransformProblem {
  int64_t images, channels;
  int branches;
  int64_t hidden[2];  // of each branch
  ElementType type;
  bool pairs;  // every weight matrix and the context begin at an address that is a multiple of two of their elements
};

struct TransformPlan {
  ElementType type;
  Paths paths;  // those that it takes: with Path::kLateMerge, the first phase merges what the launch before has left
  // Forward: weights moved by one load, images of a tile, and for each product the warps that share a row's length.
  int width;
  int tile_images;
  int shares[2];
  int slab_steps;  // backward: a slab has kStepRows rows a step
  PhaseGrid grid;
  int64_t counters;  // 0 before and after the launch
  int shared_bytes;
  int64_t workspace;  // elements of the accumulation type

  int blocks() const;
  std::string to_string() const;
};

// How much of the backward pass is wanted.
enum class TransformDepth : int {
  kLastLayer,   // gradients of w2 and b2 only: one phase
  kParameters,  // of all parameters
  kContext,     // and of the context
};

// They merge late where device.paths says so: then the launch before has to have such a plan, too, and before the
// backward pass at most kMostGatheredSplits. Both throw std::invalid_argument for a problem that is larger than a launch can be.
TransformPlan make_transform_forward_plan(const TransformProblem& problem, const DeviceLimits& device);
TransformPlan make_transform_backward_plan(const TransformProblem& problem, const DeviceLimits& device,
                                           TransformDepth depth);

// Elements of the workspace: the forward pass's products, [N, P] a branch.
int64_t products_elements(const TransformProblem& problem);
// Of the backward pass, for one branch, in the order of TransformGradients.
struct TransformWorkspace {
  int64_t partial_y, grad_y, grad_hidden, partial_context;
  int64_t total() const { return partial_y + grad_y + grad_hidden + partial_context; }
};
TransformWorkspace backward_workspace(const TransformProblem& problem, const TransformPlan& plan, int branch);

}  // namespace gc
