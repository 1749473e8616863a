// The CPU implementation of the operators: checks and allocation. The cut of the work over threads is in run.h, what is
// computed in vec/.
//
// The parts of the block, each an operator of its own; the whole block is in block.cpp. Vectors per image or channel
// are converted to the accumulation type up front; they are small.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/feature_map.h"
#include "cpu/run.h"

namespace gc::cpu {

namespace {

using at::Tensor;

struct Pooled {
  Tensor context;
  Tensor logits;
  Tensor state;
};

// The weighted sum over pixels behind softmax_pool, attention_pool and pixel_sum.
Pooled run_pool(const FeatureMap& x, const Shape& shape, Weights weights, const Tensor& mask_weight, double mask_bias,
                Tensor logits, bool divide_by_z) {
  const Plan plan = make_plan(shape, x.tensor.element_size());
  Pooled out;
  out.context = at::empty({x.shape.images, x.shape.channels}, x.tensor.options());
  out.state = at::empty({shape.images, shape.channels + 2}, x.accumulation());
  out.logits = weights == Weights::kMask ? at::empty({shape.images, shape.pixels}, x.accumulation()) : logits;
  const Tensor partials =
      plan.splits == 1 ? out.state : at::empty({shape.images, plan.splits, shape.channels + 2}, x.accumulation());
  dispatch(x.tensor.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const PoolArgs<T> args{shape,
                           plan,
                           weights,
                           divide_by_z,
                           x.tensor.data_ptr<T>(),
                           mask_weight.defined() ? mask_weight.data_ptr<A>() : nullptr,
                           static_cast<A>(mask_bias),
                           out.logits.defined() ? out.logits.data_ptr<A>() : nullptr,
                           partials.data_ptr<A>(),
                           out.state.data_ptr<A>(),
                           out.context.data_ptr<T>()};
    run(args);
  });
  return out;
}

std::tuple<Tensor, Tensor> softmax_pool(const Tensor& x, const Tensor& logits) {
  const FeatureMap map(x, "x");
  check_companion(logits, "logits", x, map.shape.images * map.shape.pixels);
  const Pooled out = run_pool(map, map.shape, Weights::kLogits, {}, 0, accumulated(logits, map), true);
  return {out.context, out.state};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool(const Tensor& x, const Tensor& mask_weight,
                                                  const std::optional<Tensor>& mask_bias) {
  const FeatureMap map(x, "x");
  check_companion(mask_weight, "mask_weight", x, map.shape.channels);
  double bias = 0;
  if (mask_bias.has_value()) {
    check_companion(*mask_bias, "mask_bias", x, 1);
    bias = mask_bias->item<double>();
  }
  const Pooled out = run_pool(map, map.shape, Weights::kMask, accumulated(mask_weight, map), bias, {}, true);
  return {out.context, out.logits, out.state};
}

Tensor pixel_sum(const Tensor& x, bool mean) {
  const FeatureMap map(x, "x");
  return run_pool(map, streaming(map.shape), Weights::kUniform, {}, 0, {}, mean).context;
}

struct PoolGradients {
  Tensor x;
  Tensor logits;
  Tensor mask_weight;
};

// With a mask_weight: its gradient, and the logits' share in grad_x; without: the gradient of the logits.
PoolGradients run_pool_backward(const Tensor& grad_context, const FeatureMap& x, const Tensor& mask_weight,
                                const Tensor& logits, const Tensor& state) {
  const Shape& shape = x.shape;
  check_companion(grad_context, "grad_context", x.tensor, shape.images * shape.channels);
  check_companion(logits, "logits", x.tensor, shape.images * shape.pixels);
  check_companion(state, "state", x.tensor, shape.images * (shape.channels + 2));
  const Plan plan = make_plan(shape, x.tensor.element_size());
  const Tensor wide_grad = accumulated(grad_context, x);
  const Tensor wide_logits = accumulated(logits, x);
  const Tensor wide_state = accumulated(state, x);
  const bool mask = mask_weight.defined();
  const Tensor wide_weight = mask ? accumulated(mask_weight, x) : Tensor();
  const Tensor attention = at::empty(logits.sizes(), x.accumulation());
  const Tensor grad_logits = at::empty(logits.sizes(), x.accumulation());
  const Tensor grad_logits_sums = at::empty({shape.images * plan.splits}, x.accumulation());
  PoolGradients out;
  out.x = x.like();
  const Tensor parts = mask ? at::empty({1, shape.images * plan.splits, shape.channels}, x.accumulation()) : Tensor();
  dispatch(x.tensor.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    run(PoolBackwardArgs<T>{shape, plan, wide_grad.data_ptr<A>(), x.tensor.data_ptr<T>(), wide_logits.data_ptr<A>(),
                            wide_state.data_ptr<A>(), attention.data_ptr<A>(), grad_logits.data_ptr<A>(),
                            grad_logits_sums.data_ptr<A>(), mask ? parts.data_ptr<A>() : nullptr});
    run(GradXArgs<T>{shape, nullptr, nullptr, attention.data_ptr<A>(), wide_grad.data_ptr<A>(),
                     grad_logits.data_ptr<A>(), mask ? wide_weight.data_ptr<A>() : nullptr, out.x.data_ptr<T>(),
                     past_caches(x)});
    if (mask) out.mask_weight = empty_gradient(mask_weight).copy_(sum_members<T>(parts).view(mask_weight.sizes()));
  });
  if (!mask) out.logits = grad_logits.to(logits.scalar_type());
  return out;
}

std::tuple<Tensor, Tensor> softmax_pool_backward(const Tensor& grad_context, const Tensor& x, const Tensor& logits,
                                                 const Tensor& state) {
  const PoolGradients grads = run_pool_backward(grad_context, FeatureMap(x, "x"), {}, logits, state);
  return {grads.x, grads.logits};
}

std::tuple<Tensor, Tensor> attention_pool_backward(const Tensor& grad_context, const Tensor& x,
                                                   const Tensor& mask_weight, const Tensor& logits,
                                                   const Tensor& state) {
  const FeatureMap map(x, "x");
  check_companion(mask_weight, "mask_weight", x, map.shape.channels);
  const PoolGradients grads = run_pool_backward(grad_context, map, mask_weight, logits, state);
  return {grads.x, grads.mask_weight};
}

Tensor broadcast(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& term) {
  const FeatureMap map(x, "x");
  TORCH_CHECK(scale.has_value() || term.has_value(), "broadcast needs a scale or a term, got neither");
  const auto companion = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor.has_value()) return Tensor();
    check_companion(*tensor, name, x, map.shape.images * map.shape.channels);
    return accumulated(*tensor, map);
  };
  const Tensor wide_scale = companion(scale, "scale");
  const Tensor wide_term = companion(term, "term");
  const Tensor out = map.like();
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const BroadcastArgs<T> args{map.shape,
                                map.tensor.data_ptr<T>(),
                                scale ? wide_scale.data_ptr<A>() : nullptr,
                                term ? wide_term.data_ptr<A>() : nullptr,
                                out.data_ptr<T>(),
                                past_caches(map)};
    run(args);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> broadcast_mul_backward(const Tensor& grad, const Tensor& x, const Tensor& scale) {
  const FeatureMap map(x, "x");
  check_like(grad, "grad", x);
  check_companion(scale, "scale", x, map.shape.images * map.shape.channels);
  const Shape shape = streaming(map.shape);
  const Plan plan = make_plan(shape, x.element_size());
  const Tensor same_grad = grad.contiguous(map.format);
  const Tensor wide_scale = accumulated(scale, map);
  const Tensor grad_x = map.like();
  const Tensor scale_parts = at::empty({shape.images, plan.splits, shape.channels}, map.accumulation());
  const Tensor term_parts = at::empty_like(scale_parts);
  const int64_t sizes[] = {map.shape.images, map.shape.channels};
  Tensor grad_scale, grad_term;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const BroadcastBackwardArgs<T> args{shape,
                                        plan,
                                        same_grad.data_ptr<T>(),
                                        map.tensor.data_ptr<T>(),
                                        wide_scale.data_ptr<A>(),
                                        grad_x.data_ptr<T>(),
                                        scale_parts.data_ptr<A>(),
                                        term_parts.data_ptr<A>()};
    run(args);
    grad_scale = sum_members<T>(scale_parts).to(scale.scalar_type()).view(sizes);
    grad_term = sum_members<T>(term_parts).to(scale.scalar_type()).view(sizes);
  });
  return {grad_x, grad_scale, grad_term};
}

}  // namespace

}  // namespace gc::cpu

TORCH_LIBRARY_IMPL(gc_cuda, CPU, m) {
  m.impl("softmax_pool", &gc::cpu::softmax_pool);
  m.impl("softmax_pool_backward", &gc::cpu::softmax_pool_backward);
  m.impl("attention_pool", &gc::cpu::attention_pool);
  m.impl("attention_pool_backward", &gc::cpu::attention_pool_backward);
  m.impl("pixel_sum", &gc::cpu::pixel_sum);
  m.impl("broadcast", &gc::cpu::broadcast);
  m.impl("broadcast_mul_backward", &gc::cpu::broadcast_mul_backward);
}
