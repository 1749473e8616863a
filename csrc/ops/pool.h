// The operators that pool, each way: softmax_pool, attention_pool and pixel_sum (schemas: schema.cpp).
#pragma once

#include <tuple>

#include "ops/memory.h"

namespace gc::ops {

template <typename Device>
std::tuple<Tensor, Tensor> softmax_pool(const Tensor& x, const Tensor& logits) {
  const FeatureMap map(x, "x");
  check_companion(logits, "logits", x, map.images() * map.pixels());
  Tensor context = map.empty({map.images(), map.channels()});
  Tensor state = map.empty_accumulation({map.images(), map.channels() + kStatistics});
  const Tensor own_logits = logits.contiguous();
  PoolForwardCall call;
  call.given_logits = map.companion(own_logits);
  call.context = context.data_ptr();
  call.state = state.data_ptr();
  launch_alone<Device>(map, typename Device::PoolForward(map, Weighting::kLogits), call);
  return {std::move(context), std::move(state)};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> attention_pool(const Tensor& x, const Tensor& mask_weight,
                                                  const OptionalTensor& mask_bias) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, mask_bias, x);
  Tensor context = map.empty({map.images(), map.channels()});
  Tensor logits = map.empty_accumulation({map.images(), map.pixels()});
  Tensor state = map.empty_accumulation({map.images(), map.channels() + kStatistics});
  const Tensor own_weight = mask_weight.contiguous();
  PoolForwardCall call;
  call.mask_weight = map.companion(own_weight);
  call.mask_bias = map.companion(mask_bias.value_or(Tensor()));
  call.logits = logits.data_ptr();
  call.context = context.data_ptr();
  call.state = state.data_ptr();
  launch_alone<Device>(map, typename Device::PoolForward(map, Weighting::kMask), call);
  return {std::move(context), std::move(logits), std::move(state)};
}

template <typename Device>
Tensor pixel_sum(const Tensor& x, bool mean) {
  const FeatureMap map(x, "x");
  Tensor context = map.empty({map.images(), map.channels()});
  PoolForwardCall call;
  call.factor = mean ? 1.0 / static_cast<double>(map.pixels()) : 1.0;
  call.context = context.data_ptr();
  launch_alone<Device>(map, typename Device::PoolForward(map, Weighting::kUniform), call);
  return context;
}

// The gradients of x and, without a mask_weight, of the logits, or else of the mask_weight.
template <typename Device>
std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad_context, const Tensor& x, const OptionalTensor& mask_weight,
                                         const Tensor& logits, const Tensor& state) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, {}, x);
  check_companion(grad_context, "grad_context", x, map.images() * map.channels());
  check_companion(logits, "logits", x, map.images() * map.pixels());
  check_accumulated(state, "state", x, map.images() * (map.channels() + kStatistics));
  const bool mask = mask_weight.has_value();
  Tensor grad_x = Device::empty_output(map);
  Tensor other = mask ? empty_gradient(*mask_weight) : empty_beside(logits, logits.sizes(), logits.scalar_type());
  if (map.images() == 0) other.zero_();
  const Tensor own_grad = grad_context.contiguous(), own_weight = contiguous(mask_weight);
  const Tensor own_logits = logits.contiguous(), own_state = state.contiguous();
  PoolBackwardCall call;
  call.grad_context = map.companion(own_grad);
  call.mask_weight = map.companion(own_weight);
  call.logits = map.companion(own_logits);
  call.state = own_state.data_ptr();
  call.grad_x = grad_x.data_ptr();
  (mask ? call.grad_weight : call.grad_logits) = map.companion_out(other);
  const PoolGradient gradient = mask ? PoolGradient::kMask : PoolGradient::kLogits;
  launch_alone<Device>(map, typename Device::PoolBackward(map, gradient, call.grad_x, nullptr), call);
  return {std::move(grad_x), std::move(other)};
}

template <typename Device>
std::tuple<Tensor, Tensor> softmax_pool_backward(const Tensor& grad_context, const Tensor& x, const Tensor& logits,
                                                 const Tensor& state) {
  return pool_backward<Device>(grad_context, x, {}, logits, state);
}

template <typename Device>
std::tuple<Tensor, Tensor> attention_pool_backward(const Tensor& grad_context, const Tensor& x,
                                                   const Tensor& mask_weight, const Tensor& logits,
                                                   const Tensor& state) {
  return pool_backward<Device>(grad_context, x, mask_weight, logits, state);
}

}  // namespace gc::ops
