// The operators that give a value per image and channel to every pixel (schemas: schema.cpp).
#pragma once

#include <tuple>

#include "ops/memory.h"

namespace gc::ops {

template <typename Device>
Tensor broadcast(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& term) {
  TORCH_CHECK_VALUE(scale.has_value() || term.has_value(), "broadcast needs a scale, a term or both, got neither");
  const FeatureMap map(x, "x");
  const int64_t count = map.images() * map.channels();
  if (scale.has_value()) check_companion(*scale, "scale", x, count);
  if (term.has_value()) check_companion(*term, "term", x, count);
  Tensor out = Device::empty_output(map);
  const Tensor own_scale = contiguous(scale), own_term = contiguous(term);
  BroadcastCall call;
  call.scale = map.companion(own_scale);
  call.term = map.companion(own_term);
  call.out = out.data_ptr();
  Device::broadcast(map, call);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> broadcast_mul_backward(const Tensor& grad, const Tensor& x, const Tensor& scale) {
  const FeatureMap map(x, "x");
  check_like(grad, "grad", x);
  check_companion(scale, "scale", x, map.images() * map.channels());
  const FeatureMap own_grad(map.in_my_layout(grad), "grad");
  const Tensor own_scale = scale.contiguous();
  Tensor grad_x = Device::empty_output(map);
  Tensor grad_scale = empty_beside(scale, {map.images(), map.channels()}, scale.scalar_type());
  Tensor grad_term = empty_beside(scale, {map.images(), map.channels()}, scale.scalar_type());
  BroadcastBackwardCall call;
  call.scale = map.companion(own_scale);
  call.grad_x = grad_x.data_ptr();
  call.grad_scale = map.companion_out(grad_scale);
  call.grad_term = map.companion_out(grad_term);
  launch_alone<Device>(map, typename Device::BroadcastBackward(map, own_grad, true, call.grad_x), call);
  return {std::move(grad_x), std::move(grad_scale), std::move(grad_term)};
}

template <typename Device>
std::tuple<Tensor, Tensor> broadcast_sums(const Tensor& grad, const Tensor& x) {
  const FeatureMap map(x, "x");
  check_like(grad, "grad", x);
  const FeatureMap own_grad(map.in_my_layout(grad), "grad");
  Tensor grad_scale = map.empty({map.images(), map.channels()});
  Tensor grad_term = map.empty({map.images(), map.channels()});
  BroadcastBackwardCall call;
  call.grad_scale = map.companion_out(grad_scale);
  call.grad_term = map.companion_out(grad_term);
  launch_alone<Device>(map, typename Device::BroadcastBackward(map, own_grad, true, nullptr), call);
  return {std::move(grad_scale), std::move(grad_term)};
}

}  // namespace gc::ops
