// The residual tail as an operator (schemas: schema.cpp): batch normalization, the context block, the addition and the
// ReLU at the end of a bottleneck. x = BN(y) is never made: every pass reads y.
//
// Forward: statistics of y, where they are those of the batch; pooling, the transform; and out from y and identity.
// Backward: the ReLU's, with its sums over the pixels; the transform; the pooling's; and grad_y.
// A factor for each image, where there is one, scales the vectors between the passes, which do not know of it.
// Where the batch is spread over processes, they exchange the statistics, and the sums before grad_y (exchange.h).
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/exchange.h"
#include "ops/memory.h"
#include "ops/tail_problem.h"

namespace gc::ops {

// scale [N, C], which may be null: 1, times the factor of each image; not defined where there is none.
inline Tensor times_image_factor(const FeatureMap& map, const Tensor& image_factor, void* scale) {
  if (!image_factor.defined()) return Tensor();
  if (scale != nullptr) return view_of(map, scale, map.images(), map.channels()) * image_factor;
  return image_factor.expand({map.images(), map.channels()}).contiguous();
}

template <typename Device>
std::tuple<Tensor, Tensor> tail_forward(const FeatureMap& map, const TailProblem& problem,
                                        const OptionalTensor& identity, const NormSource& source,
                                        const Running& running, double eps, bool relu, const Group& group) {
  const bool of_batch = problem.of_batch(), attention = problem.attention();
  Tensor out = Device::empty_output(map);
  Tensor memory = map.empty_accumulation({problem.kept.elements});
  const bool exchanges = group.exchanges(problem.kind);
  const TailParts kept(memory.data_ptr(), problem.kept, map, problem.attention(), problem.branches);
  StatisticsCall taking;
  taking.mean = kept.mean;
  taking.inverse_std = kept.inverse_std;
  taking.variance = kept.variance;
  if (map.images() == 0) {
    memory.zero_();
    if (exchanges) exchange_statistics(map, taking, source.eps, running, group);
    return {std::move(out), std::move(memory)};
  }
  const bool pools = problem.has_block() && (attention || !of_batch);  // the batch's statistics have the means

  const typename Device::Statistics statistics(map, of_batch);
  std::optional<typename Device::PoolForward> pool;
  std::optional<typename Device::TransformForward> transform;
  if (pools) {
    pool.emplace(map, attention ? Weighting::kMask : Weighting::kUniform, /*transform_follows=*/true,
                 /*normalized=*/true);
  }
  if (problem.has_block()) transform.emplace(map, problem.branches, pool ? pool->left() : Unmerged{});
  const Tensor own_identity = identity.has_value() ? map.in_my_layout(*identity) : Tensor();
  const typename Device::Residual residual(map, pointer(own_identity), out.data_ptr());
  const Wanted of_statistics = statistics.wanted(), of_residual = residual.wanted();
  const Wanted of_pool = pool ? pool->wanted() : Wanted{}, of_transform = transform ? transform->wanted() : Wanted{};
  const int64_t per_channel = map.images() * map.channels();
  Scratch scratch(map);
  void *state, *term, *statistics_workspace, *pool_workspace, *transform_workspace, *residual_workspace;
  scratch.allocate([&] {
    state = problem.has_block() ? scratch.take(per_channel + map.images() * kStatistics) : nullptr;
    term = problem.branches.has(kAdd) ? scratch.take(per_channel) : nullptr;
    statistics_workspace = scratch.take(of_statistics.workspace);
    pool_workspace = scratch.take(of_pool.workspace);
    transform_workspace = scratch.take(of_transform.workspace);
    residual_workspace = scratch.take(of_residual.workspace);
  });
  const typename Device::Counters counters(std::max({of_statistics.counters, of_pool.counters, of_transform.counters}),
                                           map);

  taking.eps = source.eps;
  const Tensor mean = contiguous(source.mean), variance = contiguous(source.variance);
  if (problem.kind == NormKind::kGiven) {
    taking.given_mean = map.companion(mean);
    taking.given_variance = map.companion(variance);
  }
  taking.given_bias = map.companion(problem.bias);
  taking.bias = kept.bias;
  taking.weight = map.companion(problem.weight);
  if (problem.has_block() && !pool) {
    taking.state = kept.block->state;
    taking.state_of_x = state;
  }
  if (running.mean.has_value() && !exchanges) taking.running_mean = map.companion_out(*running.mean);
  if (running.variance.has_value() && !exchanges) taking.running_variance = map.companion_out(*running.variance);
  taking.momentum = running.momentum;
  statistics.launch(taking, {statistics_workspace, counters.get()});
  if (exchanges) {
    exchange_statistics(map, taking, source.eps, running, group);
    if (taking.state_of_x != nullptr) contexts_of_x(map, taking, problem.weight, problem.bias);
  }

  Norm norm = problem.norm(map, kept);
  if (!of_batch) norm.given = &taking;
  if (problem.has_block()) {
    const Tensor own_weight = contiguous(problem.mask_weight);
    PoolForwardCall pooling;
    pooling.norm = norm;
    pooling.mask_weight = map.companion(own_weight);
    if (problem.mask_bias.has_value()) pooling.mask_bias = map.companion(*problem.mask_bias);
    if (attention) {
      pooling.logits = kept.block->logits;
    } else {
      pooling.factor = 1.0 / static_cast<double>(map.pixels());
    }
    pooling.state = kept.block->state;
    pooling.state_of_x = state;
    if (pool) pool->launch(pooling, {pool_workspace, counters.get()});
    KeptParts of_x = *kept.block;
    of_x.set_state(state, map);
    const TransformForwardCall transforming{*problem.kinds, eps, of_x, /*outs=*/{term, of_x.scale}, pooling, nullptr};
    transform->launch(transforming, {transform_workspace, counters.get()});
  }
  void* const of_block = problem.has_block() ? kept.block->scale : nullptr;
  const Tensor scale = times_image_factor(map, problem.image_factor, of_block);
  if (scale.defined() && term != nullptr) view_of(map, term, map.images(), map.channels()).mul_(problem.image_factor);
  ResidualCall adding;
  adding.first = !problem.has_block() && !of_batch;
  adding.norm = norm;
  adding.identity = pointer(own_identity);
  adding.scale = scale.defined() ? scale.data_ptr() : of_block;
  adding.term = term;
  adding.relu = relu;
  adding.out = out.data_ptr();
  residual.launch(adding, {residual_workspace, nullptr});
  return {std::move(out), std::move(memory)};
}

template <typename Device>
std::tuple<Tensor, Tensor> bn_context_add_relu(const Tensor& y, const OptionalTensor& identity,
                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& mean, const OptionalTensor& variance,
                                               int64_t norm_kind, double norm_eps, const OptionalTensor& mask_weight,
                                               const OptionalTensor& mask_bias, at::TensorList add, at::TensorList mul,
                                               double eps, int64_t activation, int64_t gate, bool relu,
                                               c10::string_view group_name, int64_t group_size,
                                               const OptionalTensor& image_factor) {
  const FeatureMap map(y, "y");
  const Group group(group_name, group_size);
  const NormSource source{mean, variance, norm_eps};
  const TailProblem problem(map, norm_kind, weight, bias, mask_weight, mask_bias, add, mul, activation, gate,
                            image_factor);
  problem.check_forward(map, identity, source, eps, group.exchanges(problem.kind));
  return tail_forward<Device>(map, problem, identity, source, Running(), eps, relu, group);
}

template <typename Device>
std::tuple<Tensor, Tensor> bn_context_add_relu_training(
    const Tensor& y, const OptionalTensor& identity, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_variance, double momentum, double norm_eps,
    const OptionalTensor& mask_weight, const OptionalTensor& mask_bias, at::TensorList add, at::TensorList mul,
    double eps, int64_t activation, int64_t gate, bool relu, c10::string_view group_name, int64_t group_size,
    const OptionalTensor& image_factor) {
  const FeatureMap map(y, "y");
  const Group group(group_name, group_size);
  const NormSource source{{}, {}, norm_eps};
  const int64_t of_batch = static_cast<int64_t>(NormKind::kBatch);
  const TailProblem problem(map, of_batch, weight, bias, mask_weight, mask_bias, add, mul, activation, gate,
                            image_factor);
  problem.check_forward(map, identity, source, eps, group.exchanges(problem.kind));
  check_running(running_mean, "running_mean", map.tensor());
  check_running(running_variance, "running_var", map.tensor());
  return tail_forward<Device>(map, problem, identity, source, {running_mean, running_variance, momentum}, eps, relu,
                              group);
}

template <typename Device>
std::vector<Tensor> bn_context_add_relu_backward(const Tensor& grad, const OptionalTensor& y, const OptionalTensor& out,
                                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                                 int64_t norm_kind, const OptionalTensor& mask_weight,
                                                 const OptionalTensor& mask_bias, at::TensorList add,
                                                 at::TensorList mul, const Tensor& kept_before, int64_t activation,
                                                 int64_t gate, std::array<bool, TailNeeds::kCount> needed,
                                                 c10::string_view group_name, int64_t group_size,
                                                 const OptionalTensor& image_factor) {
  const Tensor& like = y.has_value() ? *y : out.has_value() ? *out : grad;
  const FeatureMap map(like, "y");
  const Group group(group_name, group_size);
  const TailProblem problem(map, norm_kind, weight, bias, mask_weight, mask_bias, add, mul, activation, gate,
                            image_factor);
  const TailNeeds needs(needed, problem.attention(), problem.of_batch());
  problem.check_backward(map, grad, y, out, kept_before, needs);

  TailGradients grads(problem, needs);
  if (needs.y()) grads.y = Device::empty_output(map);
  const Tensor own_grad = map.in_my_layout(grad);
  const bool masks = out.has_value();
  // The gradient past the ReLU is identity's, too.
  const Tensor grad_in = masks ? Device::empty_output(map) : own_grad;
  if (needs.identity()) grads.identity = grad_in;
  const bool exchanges = group.exchanges(problem.kind) && needs.y();
  if (map.images() == 0) {
    grads.zero();
    if (exchanges) exchange_sums(map, nullptr, nullptr, group);
    return grads.only_needed();
  }

  const Tensor own_out = masks ? map.in_my_layout(*out) : Tensor();
  const TailParts kept(kept_before.data_ptr(), problem.kept, map, problem.attention(), problem.branches);
  const Norm norm = problem.norm(map, kept);
  const BackwardProblem block(map, mask_weight, mask_bias, problem.branches, needs.of_block());
  const bool with_add = needs.of_block().branch(problem.branches, kAdd);
  const bool with_mul = needs.of_block().branch(problem.branches, kMul);
  const bool transforms = with_add || with_mul;
  const bool pools = transforms && problem.attention() && needs.pooling();
  // The softmax does not feel it. Where a transform runs, that writes it.
  Tensor& of_mask_bias = grads.of_block[Needs::kMaskBias];
  if (!transforms && of_mask_bias.defined()) of_mask_bias.zero_();
  const bool products = needs.products(with_mul);
  // Without a ReLU, a block and gradients of the norm, grad is all there is to know.
  const bool sums_grad = masks || transforms || needs.norm();
  std::optional<typename Device::ResidualSums> sums;
  std::optional<typename Device::TransformBackward> transform;
  std::optional<typename Device::PoolBackward> pool;
  std::optional<typename Device::GradY> last;
  Wanted of_sums, of_transform, of_pool, of_last;
  const auto plan = [](auto& pass, Wanted& wanted, const auto&... given) { wanted = pass.emplace(given...).wanted(); };
  if (sums_grad) {
    plan(sums, of_sums, map, products, own_grad.data_ptr(), pointer(own_out), masks ? grad_in.data_ptr() : nullptr);
  }
  if (transforms) plan(transform, of_transform, map, block, nullptr, Unmerged(), /*normalized=*/true);
  if (pools) plan(pool, of_pool, map, PoolGradient::kMask, nullptr, nullptr, /*normalized=*/true);
  if (needs.y()) plan(last, of_last, map, pools, problem.of_batch(), grad_in.data_ptr(), grads.y.data_ptr());

  const int64_t per_channel = map.images() * map.channels(), pixels = map.images() * map.pixels();
  Scratch scratch(map);
  void *sum, *product_sum, *grad_context, *attention, *grad_logits, *grad_folded, *weight_sum, *bias_sum;
  void *sums_workspace, *transform_workspace, *pool_workspace, *last_workspace;
  scratch.allocate([&] {
    sum = scratch.take(sums_grad ? per_channel : 0);
    product_sum = products ? scratch.take(per_channel) : nullptr;
    grad_context = transforms && needs.of_block().context() ? scratch.take(per_channel) : nullptr;
    attention = pools ? scratch.take(pixels) : nullptr;
    grad_logits = pools ? scratch.take(pixels) : nullptr;
    grad_folded = pools ? scratch.take(map.channels()) : nullptr;
    weight_sum = scratch.take(map.channels());
    bias_sum = scratch.take(map.channels());
    sums_workspace = scratch.take(of_sums.workspace);
    transform_workspace = scratch.take(of_transform.workspace);
    pool_workspace = scratch.take(of_pool.workspace);
    last_workspace = scratch.take(of_last.workspace);
  });
  const typename Device::Counters counters(
      std::max({of_sums.counters, of_transform.counters, of_pool.counters, of_last.counters}), map);

  if (sums) {
    ResidualSumsCall summing;
    summing.norm = norm;
    summing.grad = own_grad.data_ptr();
    summing.out = pointer(own_out);
    summing.grad_in = masks ? grad_in.data_ptr() : nullptr;
    summing.sums = sum;
    summing.product_sums = product_sum;
    sums->launch(summing, {sums_workspace, counters.get()});
  }
  if (problem.image_factor.defined()) {
    for (void* const one : {sum, product_sum}) {
      if (one != nullptr) view_of(map, one, map.images(), map.channels()).mul_(problem.image_factor);
    }
  }

  if (transform) {
    const NormalizedSums of_branches{norm, sum, product_sum};
    TransformBackwardCall transforming{*problem.kinds, 1, *kept.block, {}, grad_context, grads.of_block};
    transforming.normalized = &of_branches;
    transform->launch(transforming, {transform_workspace, counters.get()});
  }
  const Tensor own_weight = contiguous(mask_weight);
  if (pool) {
    PoolBackwardCall pooling;
    pooling.norm = norm;
    pooling.grad_context = wide(grad_context);
    pooling.logits = wide(kept.block->logits);
    pooling.state = kept.block->state;
    pooling.attention = attention;
    pooling.grad_logits = wide_out(grad_logits);
    pooling.grad_weight = wide_out(grad_folded);
    pool->launch(pooling, {pool_workspace, counters.get()});
  }
  NormGradientsCall of_norm;
  of_norm.norm = norm;
  of_norm.sums = sum;
  of_norm.product_sums = product_sum;
  of_norm.scale = problem.has_block() ? kept.block->scale : nullptr;
  of_norm.grad_context = grad_context;
  of_norm.state = problem.has_block() ? kept.block->state : nullptr;
  of_norm.grad_folded = grad_folded;
  of_norm.mask_weight = map.companion(own_weight);
  of_norm.grad_weight_sum = weight_sum;
  of_norm.grad_bias_sum = bias_sum;
  of_norm.grad_weight = map.companion_out(grads.weight);
  of_norm.grad_bias = map.companion_out(grads.bias);
  of_norm.grad_mask_weight = map.companion_out(grads.of_block[Needs::kMaskWeight]);
  if (exchanges) {
    Device::norm_gradients(map, of_norm);
    exchange_sums(map, weight_sum, bias_sum, group);
  }
  if (last) {
    void* const of_block = problem.has_block() ? kept.block->scale : nullptr;
    const Tensor scale = times_image_factor(map, problem.image_factor, of_block);
    GradYCall ending;
    ending.norm = norm;
    ending.grad = grad_in.data_ptr();
    ending.scale = scale.defined() ? scale.data_ptr() : of_block;
    ending.grad_context = grad_context;
    ending.attention = attention;
    ending.grad_logits = grad_logits;
    ending.mask_weight = map.companion(own_weight);
    ending.grad_weight = weight_sum;
    ending.grad_bias = bias_sum;
    ending.of_norm = needs.norm() && !exchanges ? &of_norm : nullptr;
    ending.grad_y = grads.y.data_ptr();
    last->launch(ending, {last_workspace, counters.get()});
  } else if (needs.norm()) {
    Device::norm_gradients(map, of_norm);
  }
  return grads.only_needed();
}

}  // namespace gc::ops
