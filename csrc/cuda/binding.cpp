// The CUDA implementation of the operators, and the only file here that knows torch: checks, allocation, device and
// stream, and the arguments of each launch. No synchronisation; every buffer comes from torch's allocator.
//
// A feature map keeps its layout: channels_last stays channels_last, anything that is neither that nor NCHW is copied
// to the nearer of the two.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"
#include "cuda/launch.h"

namespace gc::cuda {

namespace {

using at::Tensor;

DeviceLimits device_limits(int device) {
  DeviceLimits limits{};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return limits;
}

// Counters for arrive_last: 0 at rest, for the last block of every launch resets its own. One set a device and stream,
// so that concurrent launches never share one. While a graph is captured, a set of its own, whose fill is captured too.
Tensor zeroed_tickets(int64_t count, const at::TensorOptions& options, cudaStream_t stream) {
  const auto make = [&](int64_t size) { return at::zeros({size}, options.dtype(at::kInt)); };
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return make(count);

  static std::mutex mutex;
  static auto& sets = *new std::map<std::pair<int, cudaStream_t>, Tensor>;  // outlives the allocator's own end
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& set = sets[{options.device().index(), stream}];
  constexpr int64_t kSmallestSet = 1024;
  if (!set.defined() || set.numel() < count) set = make(std::max(kSmallestSet, 2 * count));
  return set;
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

// A feature map in one of the two layouts, on its device's current stream.
class FeatureMap {
 public:
  FeatureMap(const Tensor& x, const char* name) : guard_(x.device()) {
    check_feature_map(x, name);
    format_ = x.is_contiguous() ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
    tensor_ = x.contiguous(format_);
    stream_ = c10::cuda::getCurrentCUDAStream(x.device().index());
  }

  const Tensor& tensor() const { return tensor_; }
  cudaStream_t stream() const { return stream_; }
  int64_t images() const { return tensor_.size(0); }
  int64_t channels() const { return tensor_.size(1); }
  int64_t pixels() const { return tensor_.size(2) * tensor_.size(3); }

  // Another map, in this one's layout.
  Tensor in_my_layout(const Tensor& other) const { return other.contiguous(format_); }
  Tensor empty_like() const { return at::empty(tensor_.sizes(), tensor_.options().memory_format(format_)); }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, tensor_.options()); }
  Tensor empty_accumulation(at::IntArrayRef sizes) const {
    return at::empty(sizes, tensor_.options().dtype(accumulation_type(tensor_.scalar_type())));
  }
  Tensor tickets(const Plan& plan) const {
    return plan.tickets > 0 ? zeroed_tickets(plan.tickets, tensor_.options(), stream_) : Tensor();
  }

  // `maps`: every feature map of the launch; their addresses decide on the width of loads and stores.
  Plan plan(KernelKind kind, std::initializer_list<Tensor> maps, bool dots_given = false) const {
    Problem problem{images(), channels(), pixels(),
                    format_ == at::MemoryFormat::Contiguous ? Layout::kNCHW : Layout::kNHWC,
                    element_type(tensor_.scalar_type())};
    for (const Tensor& map : maps) {
      while (reinterpret_cast<uintptr_t>(map.data_ptr()) % problem.alignment != 0) problem.alignment /= 2;
    }
    try {
      return make_plan(kind, problem, device_limits(tensor_.device().index()), dots_given);
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, "x of shape ", tensor_.sizes(), " is too large: ", error.what());
    }
  }

 private:
  c10::cuda::CUDAGuard guard_;
  at::MemoryFormat format_;
  Tensor tensor_;
  cudaStream_t stream_;
};

// A companion's pointer and type; `tensor` must be contiguous and outlive the launch call.
Companion companion(const Tensor& tensor, const Tensor& x) {
  if (!tensor.defined()) return {nullptr, false};
  return {tensor.data_ptr(), tensor.scalar_type() != x.scalar_type()};
}
CompanionOut companion_out(const Tensor& tensor, const Tensor& x) {
  return {tensor.data_ptr(), tensor.scalar_type() != x.scalar_type()};
}

void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
unsigned* ticket_pointer(const Tensor& tickets) { return static_cast<unsigned*>(pointer(tickets)); }

// The workspace beyond `elements` accumulation-type values.
void* behind(const Tensor& workspace, int64_t elements) {
  return workspace.defined() ? static_cast<char*>(workspace.data_ptr()) + elements * workspace.element_size() : nullptr;
}

// vector . x[:, s] + bias for every pixel, for maps with more channels than a block can hold. vector: [N, C] or [C].
Tensor pixel_dot(const FeatureMap& x, const Tensor& vector, const Tensor& bias) {
  const Plan plan = x.plan(KernelKind::kPixelDot, {x.tensor()});
  const Tensor dots = x.empty_accumulation({x.images(), x.pixels()});
  PixelDotArgs args{};
  args.x = x.tensor().data_ptr();
  args.vector = companion(vector, x.tensor());
  args.image_stride = vector.numel() == x.channels() ? 0 : x.channels();
  args.bias = companion(bias, x.tensor());
  args.dots = dots.data_ptr();
  C10_CUDA_CHECK(launch_pixel_dot(plan, args, x.stream()));
  return dots;
}

struct Pooled {
  Tensor context, logits, state;
};

// kMask: `vector` is the mask weight; kLogits: `vector` is the logits.
Pooled pool(const FeatureMap& x, Weighting weighting, const Tensor& vector, const Tensor& bias, double factor) {
  Pooled out;
  out.context = x.empty({x.images(), x.channels()});
  if (weighting != Weighting::kUniform) out.state = x.empty_accumulation({x.images(), x.channels() + 2});
  if (weighting == Weighting::kMask) out.logits = x.empty_accumulation({x.images(), x.pixels()});
  if (x.images() == 0) return out;

  const KernelKind kind = weighting == Weighting::kMask     ? KernelKind::kPoolMask
                          : weighting == Weighting::kLogits ? KernelKind::kPoolLogits
                                                            : KernelKind::kPoolUniform;
  const Plan plan = x.plan(kind, {x.tensor()});
  if (!plan.holds_channels) {
    const Tensor logits = pixel_dot(x, vector, bias);
    Pooled pooled = pool(x, Weighting::kLogits, logits, {}, factor);
    pooled.logits = logits;
    return pooled;
  }
  const Tensor workspace = plan.workspace > 0 ? x.empty_accumulation({plan.workspace}) : Tensor();
  const Tensor tickets = x.tickets(plan);
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
  args.context = out.context.data_ptr();
  args.state = pointer(out.state);
  args.partial_context = pointer(workspace);
  args.partial_stats = behind(workspace, x.images() * plan.walk.splits * x.channels());
  args.tickets = ticket_pointer(tickets);
  C10_CUDA_CHECK(launch_pool_forward(plan, args, x.stream()));
  return out;
}

std::tuple<Tensor, Tensor> softmax_pool(const Tensor& x, const Tensor& logits) {
  const FeatureMap map(x, "x");
  check_companion(logits, "logits", x, map.images() * map.pixels());
  const Pooled out = pool(map, Weighting::kLogits, logits.contiguous(), {}, 1);
  return {out.context, out.state};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool(const Tensor& x, const Tensor& mask_weight,
                                                  const std::optional<Tensor>& mask_bias) {
  const FeatureMap map(x, "x");
  check_companion(mask_weight, "mask_weight", x, map.channels());
  if (mask_bias.has_value()) check_companion(*mask_bias, "mask_bias", x, 1);
  const Pooled out = pool(map, Weighting::kMask, mask_weight.contiguous(), mask_bias.value_or(Tensor()), 1);
  return {out.context, out.logits, out.state};
}

Tensor pixel_sum(const Tensor& x, bool mean) {
  const FeatureMap map(x, "x");
  return pool(map, Weighting::kUniform, {}, {}, mean ? 1.0 / static_cast<double>(map.pixels()) : 1.0).context;
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
    grads.mask_weight = at::empty(mask_weight.sizes(), mask_weight.options());
  } else {
    grads.logits = at::empty(logits.sizes(), logits.options());
  }
  if (x.images() == 0) {
    if (mask) grads.mask_weight.zero_();
    return grads;
  }

  const Tensor grad = grad_context.contiguous();
  const Tensor weight = mask ? mask_weight.contiguous() : Tensor();
  const Tensor contiguous_logits = logits.contiguous();
  const Tensor contiguous_state = state.contiguous();
  const KernelKind kind = mask ? KernelKind::kPoolBackwardMask : KernelKind::kPoolBackwardLogits;
  Plan plan = x.plan(kind, {x.tensor(), grads.x});
  Tensor dots;
  if (!plan.holds_channels) {
    dots = pixel_dot(x, grad.view({x.images(), x.channels()}), {});
    plan = x.plan(kind, {x.tensor(), grads.x}, /*dots_given=*/true);
  }
  const Tensor workspace = plan.workspace > 0 ? x.empty_accumulation({plan.workspace}) : Tensor();
  const Tensor tickets = x.tickets(plan);
  PoolBackwardArgs args{};
  args.x = x.tensor().data_ptr();
  args.grad_context = companion(grad, x.tensor());
  args.mask_weight = companion(weight, x.tensor());
  args.logits = companion(contiguous_logits, x.tensor());
  args.state = contiguous_state.data_ptr();
  args.dots = pointer(dots);
  args.grad_x = grads.x.data_ptr();
  if (mask) {
    args.grad_weight = companion_out(grads.mask_weight, x.tensor());
  } else {
    args.grad_logits = companion_out(grads.logits, x.tensor());
  }
  args.partial_weight = pointer(workspace);
  args.image_weight = behind(workspace, x.images() * plan.walk.splits * x.channels());
  args.tickets = ticket_pointer(tickets);
  C10_CUDA_CHECK(launch_pool_backward(plan, args, x.stream()));
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
  if (map.images() == 0) return out;

  const Tensor contiguous_scale = scale.has_value() ? scale->contiguous() : Tensor();
  const Tensor contiguous_term = term.has_value() ? term->contiguous() : Tensor();
  BroadcastArgs args{};
  args.x = map.tensor().data_ptr();
  args.scale = companion(contiguous_scale, x);
  args.term = companion(contiguous_term, x);
  args.out = out.data_ptr();
  C10_CUDA_CHECK(launch_broadcast(map.plan(KernelKind::kBroadcast, {map.tensor(), out}), args, map.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> broadcast_mul_backward(const Tensor& grad, const Tensor& x, const Tensor& scale) {
  const FeatureMap map(x, "x");
  check_like(grad, "grad", x);
  check_companion(scale, "scale", x, map.images() * map.channels());
  const Tensor grad_x = map.empty_like();
  const Tensor grad_scale = at::empty({map.images(), map.channels()}, scale.options());
  const Tensor grad_term = at::empty({map.images(), map.channels()}, scale.options());
  if (map.images() == 0) return {grad_x, grad_scale, grad_term};

  const Tensor grad_map = map.in_my_layout(grad);
  const Tensor contiguous_scale = scale.contiguous();
  const Plan plan = map.plan(KernelKind::kBroadcastMulBackward, {map.tensor(), grad_map, grad_x});
  const Tensor workspace = plan.workspace > 0 ? map.empty_accumulation({plan.workspace}) : Tensor();
  const Tensor tickets = map.tickets(plan);
  BroadcastMulBackwardArgs args{};
  args.grad = grad_map.data_ptr();
  args.x = map.tensor().data_ptr();
  args.scale = companion(contiguous_scale, x);
  args.grad_x = grad_x.data_ptr();
  args.grad_scale = companion_out(grad_scale, x);
  args.grad_term = companion_out(grad_term, x);
  args.partial_sums = pointer(workspace);
  args.tickets = ticket_pointer(tickets);
  C10_CUDA_CHECK(launch_broadcast_mul_backward(plan, args, map.stream()));
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
