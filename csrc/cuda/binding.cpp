// The CUDA implementation of the operators that are parts of the block, and the launches on tensors that the whole
// block (block.cpp) is made of too: checks, allocation, device and stream, and the arguments of each launch. No
// synchronisation; every buffer but the counters (counters.cpp) comes from torch's allocator.
//
// A feature map keeps its layout: channels_last stays channels_last, anything that is neither that nor NCHW is copied
// to the nearer of the two.
#include "cuda/binding.h"

#include <torch/library.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

namespace gc::cuda {

DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(device);
  if (at != known.end()) return at->second;
  DeviceLimits limits;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  known.emplace(device, limits);  // only now: a device that could not answer is asked again
  return limits;
}

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

namespace {

// The workspace beyond `elements` accumulation-type values.
void* behind(const Tensor& workspace, int64_t elements) {
  return workspace.defined() ? static_cast<char*>(workspace.data_ptr()) + elements * workspace.element_size() : nullptr;
}

Tensor workspace_of(const FeatureMap& x, const Plan& plan) {
  return plan.workspace > 0 ? x.empty_accumulation({plan.workspace}) : Tensor();
}

// dots[n, s] = vector . x[:, s] + bias, for maps with more channels than a block can hold; with a state, of x without
// its context. vector: [N, C] or [C].
void run_pixel_dot(const FeatureMap& x, const Tensor& vector, const Tensor& bias, const Tensor& state,
                   const Tensor& dots) {
  const Plan plan = x.plan(KernelKind::kPixelDot, {x.tensor()});
  PixelDotArgs args{};
  args.x = x.tensor().data_ptr();
  args.vector = companion(vector, x.tensor());
  args.image_stride = vector.numel() == x.channels() ? 0 : x.channels();
  args.bias = companion(bias, x.tensor());
  if (state.defined()) args.offset = behind(state, 2);  // the statistics
  args.offset_stride = x.channels() + 2;
  args.dots = dots.data_ptr();
  C10_CUDA_CHECK(launch_pixel_dot(plan, args, x.stream()));
}

}  // namespace

void run_pool(const FeatureMap& x, Weighting weighting, const Tensor& vector, const Tensor& bias, double factor,
              const Pooled& out) {
  if (x.images() == 0) return;
  const KernelKind kind = weighting == Weighting::kMask     ? KernelKind::kPoolMask
                          : weighting == Weighting::kLogits ? KernelKind::kPoolLogits
                                                            : KernelKind::kPoolUniform;
  const Plan plan = x.plan(kind, {x.tensor()});
  if (!plan.holds_channels) {
    run_pixel_dot(x, vector, bias, {}, out.logits);
    return run_pool(x, Weighting::kLogits, out.logits, {}, factor, {out.context, {}, out.state});
  }
  const Tensor workspace = workspace_of(x, plan);
  const Counters tickets = x.tickets(plan.tickets);
  PoolForwardArgs args{};
  args.x = x.tensor().data_ptr();
  if (weighting == Weighting::kMask) {
    args.mask_weight = companion(vector, x.tensor());
    args.mask_bias = companion(bias, x.tensor());
  } else if (weighting == Weighting::kLogits) {
    args.given_logits = companion(vector, x.tensor());
  }
  args.factor = factor;
  args.logits = pointer(out.logits);
  args.context = companion_out(out.context, x.tensor());
  args.state = pointer(out.state);
  args.partial_context = pointer(workspace);
  args.partial_stats = behind(workspace, x.images() * merged_rows(plan.walk.splits, plan.walk.group) * x.channels());
  args.tickets = ticket_pointer(tickets);
  C10_CUDA_CHECK(launch_pool_forward(plan, args, x.stream()));
}

void run_pool_backward(PoolGradient gradient, const FeatureMap& x, const PoolBackwardInputs& in,
                       const PoolGradients& out) {
  if (x.images() == 0) return;
  const KernelKind kind = gradient == PoolGradient::kBlock  ? KernelKind::kPoolBackwardBlock
                          : gradient == PoolGradient::kMask ? KernelKind::kPoolBackwardMask
                                                            : KernelKind::kPoolBackwardLogits;
  // Of the maps that are there: their addresses decide on the width of loads and stores.
  const Tensor& written = out.x.defined() ? out.x : x.tensor();
  const Tensor& grad = in.grad.defined() ? in.grad : x.tensor();
  Plan plan = x.plan(kind, {x.tensor(), written, grad});
  Tensor dots;
  if (!plan.holds_channels) {
    dots = x.empty_accumulation({x.images(), x.pixels()});
    run_pixel_dot(x, in.grad_context, {}, in.state, dots);
    plan = x.plan(kind, {x.tensor(), written, grad}, /*dots_given=*/true);
  }
  const Tensor workspace = workspace_of(x, plan);
  const Counters tickets = x.tickets(plan.tickets);
  PoolBackwardArgs args{};
  args.x = x.tensor().data_ptr();
  args.grad = pointer(in.grad);
  args.scale = companion(in.scale, x.tensor());
  args.grad_context = companion(in.grad_context, x.tensor());
  args.mask_weight = companion(in.mask_weight, x.tensor());
  args.logits = companion(in.logits, x.tensor());
  args.state = in.state.data_ptr();
  args.dots = pointer(dots);
  args.grad_x = pointer(out.x);
  args.grad_logits = companion_out(out.logits, x.tensor());
  args.grad_weight = companion_out(out.mask_weight, x.tensor());
  args.partial_weight = pointer(workspace);
  args.tickets = ticket_pointer(tickets);
  C10_CUDA_CHECK(launch_pool_backward(plan, args, x.stream()));
}

void run_broadcast(const FeatureMap& x, const Tensor& scale, const Tensor& term, const Tensor& out) {
  if (x.images() == 0) return;
  BroadcastArgs args{};
  args.x = x.tensor().data_ptr();
  args.scale = companion(scale, x.tensor());
  args.term = companion(term, x.tensor());
  args.out = out.data_ptr();
  C10_CUDA_CHECK(launch_broadcast(x.plan(KernelKind::kBroadcast, {x.tensor(), out}), args, x.stream()));
}

void run_broadcast_mul_backward(const FeatureMap& x, const Tensor& grad, const Tensor& scale,
                                const BroadcastGradients& out) {
  if (x.images() == 0) return;
  const Tensor& written = out.x.defined() ? out.x : x.tensor();
  const Plan plan = x.plan(KernelKind::kBroadcastMulBackward, {x.tensor(), grad, written});
  const Tensor workspace = workspace_of(x, plan);
  const Counters tickets = x.tickets(plan.tickets);
  BroadcastMulBackwardArgs args{};
  args.grad = grad.data_ptr();
  args.x = x.tensor().data_ptr();
  args.scale = companion(scale, x.tensor());
  args.grad_x = pointer(out.x);
  args.grad_scale = companion_out(out.scale, x.tensor());
  args.grad_term = companion_out(out.term, x.tensor());
  args.partial_sums = pointer(workspace);
  args.tickets = ticket_pointer(tickets);
  C10_CUDA_CHECK(launch_broadcast_mul_backward(plan, args, x.stream()));
}

namespace {

std::tuple<Tensor, Tensor> softmax_pool(const Tensor& x, const Tensor& logits) {
  const FeatureMap map(x, "x");
  check_companion(logits, "logits", x, map.images() * map.pixels());
  const Tensor context = map.empty({map.images(), map.channels()});
  const Tensor state = map.empty_accumulation({map.images(), map.channels() + 2});
  run_pool(map, Weighting::kLogits, logits.contiguous(), {}, 1, {context, {}, state});
  return {context, state};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool(const Tensor& x, const Tensor& mask_weight,
                                                  const std::optional<Tensor>& mask_bias) {
  const FeatureMap map(x, "x");
  check_companion(mask_weight, "mask_weight", x, map.channels());
  if (mask_bias.has_value()) check_companion(*mask_bias, "mask_bias", x, 1);
  const Pooled out{map.empty({map.images(), map.channels()}), map.empty_accumulation({map.images(), map.pixels()}),
                   map.empty_accumulation({map.images(), map.channels() + 2})};
  run_pool(map, Weighting::kMask, mask_weight.contiguous(), mask_bias.value_or(Tensor()), 1, out);
  return {out.context, out.logits, out.state};
}

Tensor pixel_sum(const Tensor& x, bool mean) {
  const FeatureMap map(x, "x");
  const Tensor context = map.empty({map.images(), map.channels()});
  const double factor = mean ? 1.0 / static_cast<double>(map.pixels()) : 1.0;
  run_pool(map, Weighting::kUniform, {}, {}, factor, {context, {}, {}});
  return context;
}

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
  run_pool_backward(mask ? PoolGradient::kMask : PoolGradient::kLogits, x,
                    {grad_context.contiguous(), weight, logits.contiguous(), state.contiguous(), {}, {}}, grads);
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
  run_broadcast(map, scale.has_value() ? scale->contiguous() : Tensor(),
                term.has_value() ? term->contiguous() : Tensor(), out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> broadcast_mul_backward(const Tensor& grad, const Tensor& x, const Tensor& scale) {
  const FeatureMap map(x, "x");
  check_like(grad, "grad", x);
  check_companion(scale, "scale", x, map.images() * map.channels());
  const BroadcastGradients grads{map.empty_like(), at::empty({map.images(), map.channels()}, scale.options()),
                                 at::empty({map.images(), map.channels()}, scale.options())};
  run_broadcast_mul_backward(map, map.in_my_layout(grad), scale.contiguous(), grads);
  return {grads.x, grads.scale, grads.term};
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
