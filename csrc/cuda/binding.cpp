// The CUDA implementation of the operators that are parts of the block, and the launches on tensors that the whole
// block (block.cpp) is made of too: checks, allocation, device and stream, and the arguments of each launch. No
// synchronisation; every buffer but the counters (counters.cpp) comes from torch's allocator.
//
// A feature map keeps its layout: channels_last stays channels_last, anything that is neither that nor NCHW is copied
// to the nearer of the two.
#include "cuda/binding.h"

#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/launch/planned.h"

namespace gc::cuda {

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return ElementType::kDouble;
    case at::kHalf:
      return ElementType::kHalf;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    default:
      return ElementType::kFloat;  // check_feature_map lets nothing else pass
  }
}

Plan FeatureMap::plan(KernelKind kind, std::initializer_list<const void*> maps, bool dots_given) const {
  Problem problem{images(), channels(), pixels(),
                  format_ == at::MemoryFormat::Contiguous ? Layout::kNCHW : Layout::kNHWC, type()};
  for (const void* map : maps) {
    while (reinterpret_cast<uintptr_t>(map) % problem.alignment != 0) problem.alignment /= 2;
  }
  try {
    return planned(kind, problem, device(), dots_given);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "x of shape ", tensor_.sizes(), " is too large: ", error.what());
  }
}

namespace {

int64_t accumulation_bytes_of(const FeatureMap& x) { return accumulation_bytes(x.type()); }

// dots[n, s] = vector . x[:, s] + bias, for maps with more channels than a block can hold; with a state, of x without
// its context. image_stride: of the vector, 0 where all images share it.
void launch_dots(const FeatureMap& x, const Plan& plan, Companion vector, int64_t image_stride, Companion bias,
                 const void* state, void* dots) {
  PixelDotArgs args{};
  args.x = x.tensor().data_ptr();
  args.vector = vector;
  args.image_stride = image_stride;
  args.bias = bias;
  args.offset = behind(state, 2, accumulation_bytes_of(x));  // the statistics
  args.offset_stride = x.channels() + 2;
  args.dots = dots;
  C10_CUDA_CHECK(launch_pixel_dot(plan, args, x.stream()));
}

KernelKind kind_of(Weighting weighting) {
  switch (weighting) {
    case Weighting::kMask:
      return KernelKind::kPoolMask;
    case Weighting::kLogits:
      return KernelKind::kPoolLogits;
    default:
      return KernelKind::kPoolUniform;
  }
}

KernelKind kind_of(PoolGradient gradient) {
  switch (gradient) {
    case PoolGradient::kBlock:
      return KernelKind::kPoolBackwardBlock;
    case PoolGradient::kMask:
      return KernelKind::kPoolBackwardMask;
    default:
      return KernelKind::kPoolBackwardLogits;
  }
}

}  // namespace

PoolForward::PoolForward(const FeatureMap& x, Weighting weighting) : x_(x) {
  if (x.images() == 0) return;
  plan_ = x.plan(kind_of(weighting), {x.tensor().data_ptr()});
  if (plan_.holds_channels) return;
  dots_ = x.plan(KernelKind::kPixelDot, {x.tensor().data_ptr()});
  plan_ = x.plan(KernelKind::kPoolLogits, {x.tensor().data_ptr()});
}

void PoolForward::launch(PoolForwardArgs args, void* workspace, unsigned* tickets) const {
  if (x_.images() == 0) return;
  if (dots_) {
    launch_dots(x_, *dots_, args.mask_weight, 0, args.mask_bias, nullptr, args.logits);
    args.given_logits = wide(args.logits);
    args.mask_weight = args.mask_bias = {};
    args.logits = nullptr;
  }
  args.x = x_.tensor().data_ptr();
  args.partial_context = workspace;
  args.partial_stats = behind(workspace, x_.images() * merged_rows(plan_.walk.splits, plan_.walk.group) * x_.channels(),
                              accumulation_bytes_of(x_));
  args.tickets = tickets;
  C10_CUDA_CHECK(launch_pool_forward(plan_, args, x_.stream()));
}

PoolBackward::PoolBackward(PoolGradient gradient, const FeatureMap& x, const void* grad_x, const void* grad) : x_(x) {
  if (x.images() == 0) return;
  plan_ = x.plan(kind_of(gradient), {x.tensor().data_ptr(), grad_x, grad});
  if (plan_.holds_channels) return;
  dots_ = x.plan(KernelKind::kPixelDot, {x.tensor().data_ptr()});
  plan_ = x.plan(kind_of(gradient), {x.tensor().data_ptr(), grad_x, grad}, /*dots_given=*/true);
}

void PoolBackward::launch(PoolBackwardArgs args, void* workspace, unsigned* tickets) const {
  if (x_.images() == 0) return;
  if (dots_) {
    void* const dots = workspace;
    workspace = behind(workspace, dots_elements(), accumulation_bytes_of(x_));
    launch_dots(x_, *dots_, args.grad_context, x_.channels(), {}, args.state, dots);
    args.dots = dots;
  }
  args.x = x_.tensor().data_ptr();
  args.partial_weight = workspace;
  args.tickets = tickets;
  C10_CUDA_CHECK(launch_pool_backward(plan_, args, x_.stream()));
}

BroadcastMulBackward::BroadcastMulBackward(const FeatureMap& x, const void* grad, const void* grad_x) : x_(x) {
  if (x.images() > 0) plan_ = x.plan(KernelKind::kBroadcastMulBackward, {x.tensor().data_ptr(), grad, grad_x});
}

void BroadcastMulBackward::launch(BroadcastMulBackwardArgs args, void* workspace, unsigned* tickets) const {
  if (x_.images() == 0) return;
  args.x = x_.tensor().data_ptr();
  args.partial_sums = workspace;
  args.tickets = tickets;
  C10_CUDA_CHECK(launch_broadcast_mul_backward(plan_, args, x_.stream()));
}

void launch_broadcast(const FeatureMap& x, Companion scale, Companion term, void* out) {
  if (x.images() == 0) return;
  BroadcastArgs args{};
  args.x = x.tensor().data_ptr();
  args.scale = scale;
  args.term = term;
  args.out = out;
  C10_CUDA_CHECK(launch_broadcast(x.plan(KernelKind::kBroadcast, {args.x, out}), args, x.stream()));
}

namespace {

// A launch that shares its memory with no other.
template <typename Launch, typename Args>
void launch_alone(const FeatureMap& x, const Launch& launch, const Args& args) {
  const Wanted wanted = launch.wanted();
  const Tensor workspace = wanted.workspace > 0 ? x.empty_accumulation({wanted.workspace}) : Tensor();
  const Counters tickets = x.tickets(wanted.tickets);
  launch.launch(args, pointer(workspace), tickets.get());
}

std::tuple<Tensor, Tensor> softmax_pool(const Tensor& x, const Tensor& logits) {
  const FeatureMap map(x, "x");
  check_companion(logits, "logits", x, map.images() * map.pixels());
  const Tensor context = map.empty({map.images(), map.channels()});
  const Tensor state = map.empty_accumulation({map.images(), map.channels() + 2});
  const Tensor given = logits.contiguous();
  PoolForwardArgs args{};
  args.given_logits = companion(given, map.tensor());
  args.factor = 1;
  args.context = companion_out(context, map.tensor());
  args.state = state.data_ptr();
  launch_alone(map, PoolForward(map, Weighting::kLogits), args);
  return {context, state};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool(const Tensor& x, const Tensor& mask_weight,
                                                  const std::optional<Tensor>& mask_bias) {
  const FeatureMap map(x, "x");
  check_companion(mask_weight, "mask_weight", x, map.channels());
  if (mask_bias.has_value()) check_companion(*mask_bias, "mask_bias", x, 1);
  const Tensor context = map.empty({map.images(), map.channels()});
  const Tensor logits = map.empty_accumulation({map.images(), map.pixels()});
  const Tensor state = map.empty_accumulation({map.images(), map.channels() + 2});
  const Tensor weight = mask_weight.contiguous();
  PoolForwardArgs args{};
  args.mask_weight = companion(weight, map.tensor());
  args.mask_bias = companion(mask_bias.value_or(Tensor()), map.tensor());
  args.factor = 1;
  args.logits = logits.data_ptr();
  args.context = companion_out(context, map.tensor());
  args.state = state.data_ptr();
  launch_alone(map, PoolForward(map, Weighting::kMask), args);
  return {context, logits, state};
}

Tensor pixel_sum(const Tensor& x, bool mean) {
  const FeatureMap map(x, "x");
  const Tensor context = map.empty({map.images(), map.channels()});
  PoolForwardArgs args{};
  args.factor = mean ? 1.0 / static_cast<double>(map.pixels()) : 1.0;
  args.context = companion_out(context, map.tensor());
  launch_alone(map, PoolForward(map, Weighting::kUniform), args);
  return context;
}

struct PoolGradients {
  Tensor x, logits, mask_weight;
};

// With a mask_weight: its gradient, and the logits' share in grad_x; without: the gradient of the logits.
PoolGradients pool_backward(const Tensor& grad_context, const FeatureMap& x, const Tensor& mask_weight,
                            const Tensor& logits, const Tensor& state) {
  const bool mask = mask_weight.defined();
  check_companion(grad_context, "grad_context", x.tensor(), x.images() * x.channels());
  check_companion(logits, "logits", x.tensor(), x.images() * x.pixels());
  check_companion(state, "state", x.tensor(), x.images() * (x.channels() + 2));
  TORCH_CHECK_TYPE(state.scalar_type() == accumulation_type(x.tensor().scalar_type()), "state must be ",
                   accumulation_type(x.tensor().scalar_type()), ", got ", state.scalar_type());
  PoolGradients grads;
  grads.x = x.empty_like();
  if (mask) {
    grads.mask_weight = empty_gradient(mask_weight);
    if (x.images() == 0) grads.mask_weight.zero_();
  } else {
    grads.logits = at::empty(logits.sizes(), logits.options());
  }
  const Tensor weight = mask ? mask_weight.contiguous() : Tensor();
  const Tensor of_context = grad_context.contiguous(), given_logits = logits.contiguous(), own = state.contiguous();
  PoolBackwardArgs args{};
  args.grad_context = companion(of_context, x.tensor());
  args.mask_weight = companion(weight, x.tensor());
  args.logits = companion(given_logits, x.tensor());
  args.state = own.data_ptr();
  args.grad_x = grads.x.data_ptr();
  args.grad_logits = companion_out(grads.logits, x.tensor());
  args.grad_weight = companion_out(grads.mask_weight, x.tensor());
  launch_alone(x, PoolBackward(mask ? PoolGradient::kMask : PoolGradient::kLogits, x, args.grad_x, nullptr), args);
  return grads;
}

std::tuple<Tensor, Tensor> softmax_pool_backward(const Tensor& grad_context, const Tensor& x, const Tensor& logits,
                                                 const Tensor& state) {
  const PoolGradients grads = pool_backward(grad_context, FeatureMap(x, "x"), {}, logits, state);
  return {grads.x, grads.logits};
}

std::tuple<Tensor, Tensor> attention_pool_backward(const Tensor& grad_context, const Tensor& x,
                                                   const Tensor& mask_weight, const Tensor& logits,
                                                   const Tensor& state) {
  check_companion(mask_weight, "mask_weight", x, x.dim() == 4 ? x.size(1) : 0);
  const PoolGradients grads = pool_backward(grad_context, FeatureMap(x, "x"), mask_weight, logits, state);
  return {grads.x, grads.mask_weight};
}

Tensor broadcast(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& term) {
  TORCH_CHECK_VALUE(scale.has_value() || term.has_value(), "broadcast needs a scale, a term or both, got neither");
  const FeatureMap map(x, "x");
  const int64_t count = map.images() * map.channels();
  if (scale.has_value()) check_companion(*scale, "scale", x, count);
  if (term.has_value()) check_companion(*term, "term", x, count);
  const Tensor out = map.empty_like();
  const Tensor own_scale = scale.has_value() ? scale->contiguous() : Tensor();
  const Tensor own_term = term.has_value() ? term->contiguous() : Tensor();
  launch_broadcast(map, companion(own_scale, map.tensor()), companion(own_term, map.tensor()), out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> broadcast_mul_backward(const Tensor& grad, const Tensor& x, const Tensor& scale) {
  const FeatureMap map(x, "x");
  check_like(grad, "grad", x);
  check_companion(scale, "scale", x, map.images() * map.channels());
  const Tensor same_grad = map.in_my_layout(grad), own_scale = scale.contiguous();
  const Tensor grad_x = map.empty_like();
  const Tensor grad_scale = at::empty({map.images(), map.channels()}, scale.options());
  const Tensor grad_term = at::empty({map.images(), map.channels()}, scale.options());
  BroadcastMulBackwardArgs args{};
  args.grad = same_grad.data_ptr();
  args.scale = companion(own_scale, map.tensor());
  args.grad_x = grad_x.data_ptr();
  args.grad_scale = companion_out(grad_scale, map.tensor());
  args.grad_term = companion_out(grad_term, map.tensor());
  launch_alone(map, BroadcastMulBackward(map, args.grad, args.grad_x), args);
  return {grad_x, grad_scale, grad_term};
}

}  // namespace

TORCH_LIBRARY_IMPL(gc_cuda, CUDA, m) {
  m.impl("softmax_pool", softmax_pool);
  m.impl("softmax_pool_backward", softmax_pool_backward);
  m.impl("attention_pool", attention_pool);
  m.impl("attention_pool_backward", attention_pool_backward);
  m.impl("pixel_sum", pixel_sum);
  m.impl("broadcast", broadcast);
  m.impl("broadcast_mul_backward", broadcast_mul_backward);
}

}  // namespace gc::cuda
