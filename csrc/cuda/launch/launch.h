// Launches of the kernels as planned. Asynchronous on `stream`; no allocation, no synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kernels/args.h"
#include "cuda/kernels/tail_backward_args.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/transform_plan.h"

namespace gc {

// Each takes the walk from the plan; args.walk need not be set.
cudaError_t launch_pool_forward(const Plan& plan, PoolForwardArgs args, cudaStream_t stream);
cudaError_t launch_pool_backward(const Plan& plan, PoolBackwardArgs args, cudaStream_t stream);
cudaError_t launch_pixel_dot(const Plan& plan, PixelDotArgs args, cudaStream_t stream);
cudaError_t launch_broadcast(const Plan& plan, BroadcastArgs args, cudaStream_t stream);
cudaError_t launch_broadcast_mul_backward(const Plan& plan, BroadcastMulBackwardArgs args, cudaStream_t stream);
cudaError_t launch_normalized_pool(const Plan& plan, NormalizedPoolArgs args, cudaStream_t stream);
cudaError_t launch_normalized_pixel_dot(const Plan& plan, NormalizedPixelDotArgs args, cudaStream_t stream);
cudaError_t launch_statistics(const Plan& plan, StatisticsArgs args, cudaStream_t stream);
cudaError_t launch_residual(const Plan& plan, ResidualArgs args, cudaStream_t stream);
cudaError_t launch_residual_sums(const Plan& plan, ResidualSumsArgs args, cudaStream_t stream);
cudaError_t launch_normalized_pool_backward(const Plan& plan, NormalizedPoolBackwardArgs args, cudaStream_t stream);
cudaError_t launch_grad_y(const Plan& plan, GradYArgs args, cudaStream_t stream);
cudaError_t launch_norm_gradients(ElementType type, NormGradientsArgs args, cudaStream_t stream);

// These take the phases and sizes from the plan.
cudaError_t launch_transform_forward(const TransformPlan& plan, TransformForwardArgs args, cudaStream_t stream);
cudaError_t launch_transform_backward(const TransformPlan& plan, TransformBackwardArgs args, cudaStream_t stream);
cudaError_t launch_normalized_transform_backward(const TransformPlan& plan, NormalizedTransformBackwardArgs args,
                                                 cudaStream_t stream);

}  // namespace gc
