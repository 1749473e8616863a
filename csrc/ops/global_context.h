// The whole block as an operator (schemas: schema.cpp): pool, transform, broadcast; backward the sums of the gradient
// over the pixels, the transform, and one pass over x and the gradient. Passes are planned before memory is allocated,
// which they then share.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/memory.h"

namespace gc::ops {

// out, and what is kept for the backward pass; without `keep` that lies in the scratch memory.
template <typename Device>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                   at::TensorList add, at::TensorList mul, double eps, int64_t activation, int64_t gate,
                                   bool keep) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, mask_bias, x);
  check_epsilon(eps);
  const Branches branches(add, mul, x);
  const Kinds kinds(activation, gate);
  const bool attention = mask_weight.has_value();
  const Kept layout(map, attention, branches);
  // The largest first: a small tensor in the place where it was the last time would have the heap grow.
  Tensor out = Device::empty_output(map);
  Tensor memory = keep ? map.empty_accumulation({layout.elements}) : Tensor();
  if (map.images() == 0) return {std::move(out), std::move(memory)};

  const typename Device::PoolForward pool(map, attention ? Weighting::kMask : Weighting::kUniform,
                                          /*transform_follows=*/true);
  const typename Device::TransformForward transform(map, branches, pool.left());
  const Wanted of_pool = pool.wanted(), of_transform = transform.wanted();
  Scratch scratch(map);
  void *kept_memory, *term, *pool_workspace, *transform_workspace;
  scratch.allocate([&] {
    kept_memory = keep ? memory.data_ptr() : scratch.take(layout.elements);
    term = branches.has(kAdd) ? scratch.take(map.images() * map.channels()) : nullptr;
    pool_workspace = scratch.take(of_pool.workspace);
    transform_workspace = scratch.take(of_transform.workspace);
  });
  const KeptParts kept(kept_memory, layout, map, branches);
  const typename Device::Counters counters(std::max(of_pool.counters, of_transform.counters), map);

  const Tensor own_weight = contiguous(mask_weight);
  PoolForwardCall pooling;
  pooling.mask_weight = map.companion(own_weight);
  if (mask_bias.has_value()) pooling.mask_bias = map.companion(*mask_bias);
  if (attention) {
    pooling.logits = kept.logits;
  } else {
    pooling.factor = 1.0 / static_cast<double>(map.pixels());
  }
  pooling.state = kept.state;
  pool.launch(pooling, {pool_workspace, counters.get()});
  const TransformForwardCall transforming{kinds, eps, kept, /*outs=*/{term, kept.scale}, pooling, pool_workspace};
  transform.launch(transforming, {transform_workspace, counters.get()});
  BroadcastCall broadcasting;
  broadcasting.first = false;
  broadcasting.scale = wide(kept.scale);
  broadcasting.term = wide(term);
  broadcasting.out = out.data_ptr();
  Device::broadcast(map, broadcasting);
  return {std::move(out), std::move(memory)};
}

template <typename Device>
Tensor global_context(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                      at::TensorList add, at::TensorList mul, double eps, int64_t activation, int64_t gate) {
  return std::get<0>(forward<Device>(x, mask_weight, mask_bias, add, mul, eps, activation, gate, false));
}

template <typename Device>
std::tuple<Tensor, Tensor> global_context_kept(const Tensor& x, const OptionalTensor& mask_weight,
                                               const OptionalTensor& mask_bias, at::TensorList add, at::TensorList mul,
                                               double eps, int64_t activation, int64_t gate) {
  return forward<Device>(x, mask_weight, mask_bias, add, mul, eps, activation, gate, true);
}

template <typename Device>
std::vector<Tensor> global_context_backward(const Tensor& grad, const OptionalTensor& x,
                                            const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                            at::TensorList add, at::TensorList mul, const Tensor& kept_before,
                                            int64_t activation, int64_t gate, std::array<bool, Needs::kCount> needed) {
  const FeatureMap map(x.has_value() ? *x : grad, x.has_value() ? "x" : "grad");
  const BackwardProblem problem(map, grad, x.has_value(), mask_weight, mask_bias, add, mul, kept_before, needed);
  const Needs& needs = problem.needs;
  const Kinds kinds(activation, gate);

  const Tensor grad_x = needs.x() ? Device::empty_output(map) : Tensor();  // the largest first, as in the forward pass
  Gradients grads = problem.empty_gradients();
  grads[Needs::kX] = grad_x;
  const bool with_add = needs.branch(problem.branches, kAdd), with_mul = needs.branch(problem.branches, kMul);
  if (map.images() == 0 || !(with_add || with_mul)) {
    for (const Tensor& one : grads) {
      if (one.defined()) one.zero_();
    }
    return problem.only_needed(grads);
  }

  const FeatureMap own_grad(map.in_my_layout(grad), "grad");
  const KeptParts kept(kept_before.data_ptr(), problem.kept, map, problem.branches);
  const typename Device::BroadcastBackward sums(map, own_grad, with_mul, nullptr, /*transform_follows=*/true);
  const typename Device::TransformBackward transform(map, problem, kept.context, sums.left());
  std::optional<typename Device::PoolBackward> pool;
  if (needs.attention && needs.context()) {
    pool.emplace(map, PoolGradient::kBlock, pointer(grad_x), own_grad.data());
  }
  const Wanted of_sums = sums.wanted(), of_transform = transform.wanted(), of_pool = pool ? pool->wanted() : Wanted{};

  const int64_t per_channel = map.images() * map.channels();
  Scratch scratch(map);
  void *of_add, *of_mul, *grad_context, *sums_workspace, *transform_workspace, *pool_workspace;
  scratch.allocate([&] {
    of_add = with_add ? scratch.take(per_channel) : nullptr;
    of_mul = with_mul ? scratch.take(per_channel) : nullptr;
    grad_context = needs.context() ? scratch.take(per_channel) : nullptr;
    sums_workspace = scratch.take(of_sums.workspace);
    transform_workspace = scratch.take(of_transform.workspace);
    pool_workspace = scratch.take(of_pool.workspace);
  });
  const typename Device::Counters counters(std::max({of_sums.counters, of_transform.counters, of_pool.counters}), map);

  BroadcastBackwardCall summing;
  summing.grad_scale = wide_out(of_mul);
  summing.grad_term = wide_out(of_add);
  sums.launch(summing, {sums_workspace, counters.get()});
  const double factor = needs.attention ? 1.0 : 1.0 / static_cast<double>(map.pixels());
  const std::array<void*, 2> grad_outs{of_add, of_mul};
  const TransformBackwardCall transforming{kinds, factor, kept, grad_outs, grad_context, grads, sums_workspace};
  transform.launch(transforming, {transform_workspace, counters.get()});
  if (pool) {
    const Tensor own_weight = contiguous(mask_weight);
    PoolBackwardCall pooling;
    pooling.grad = own_grad.data();
    pooling.scale = wide(kept.scale);
    pooling.grad_context = wide(grad_context);
    pooling.mask_weight = map.companion(own_weight);
    pooling.logits = wide(kept.logits);
    pooling.state = kept.state;
    pooling.grad_x = pointer(grad_x);
    pooling.grad_weight = map.companion_out(grads[Needs::kMaskWeight]);
    pool->launch(pooling, {pool_workspace, counters.get()});
  } else if (needs.context()) {
    BroadcastCall broadcasting;
    broadcasting.first = false;
    broadcasting.scale = wide(kept.scale);
    broadcasting.term = wide(grad_context);
    broadcasting.out = grad_x.data_ptr();
    Device::broadcast(own_grad, broadcasting);
  }
  return problem.only_needed(grads);
}

}  // namespace gc::ops
