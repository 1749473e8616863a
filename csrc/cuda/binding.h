// What the bindings of the parts and of the whole block share: a feature map on its stream, and the launches on
// tensors. Only the files that include this know torch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>
#include <utility>

#include "checks.h"
#include "cuda/counters.h"
#include "cuda/launch.h"

namespace gc::cuda {

using at::Tensor;

DeviceLimits device_limits(int device);
ElementType element_type(at::ScalarType type);

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
  // For one launch on this map; must live until after it.
  Counters tickets(int64_t count) const { return Counters(count, tensor_.device().index(), stream_); }
  DeviceLimits limits() const { return device_limits(tensor_.device().index()); }

  // `maps`: every feature map of the launch; their addresses decide on the width of loads and stores.
  Plan plan(KernelKind kind, std::initializer_list<Tensor> maps, bool dots_given = false) const {
    Problem problem{images(), channels(), pixels(),
                    format_ == at::MemoryFormat::Contiguous ? Layout::kNCHW : Layout::kNHWC,
                    element_type(tensor_.scalar_type())};
    for (const Tensor& map : maps) {
      while (reinterpret_cast<uintptr_t>(map.data_ptr()) % problem.alignment != 0) problem.alignment /= 2;
    }
    try {
      return make_plan(kind, problem, limits(), dots_given);
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
inline Companion companion(const Tensor& tensor, const Tensor& x) {
  if (!tensor.defined()) return {nullptr, false};
  return {tensor.data_ptr(), tensor.scalar_type() != x.scalar_type()};
}
inline CompanionOut companion_out(const Tensor& tensor, const Tensor& x) {
  if (!tensor.defined()) return {nullptr, false};
  return {tensor.data_ptr(), tensor.scalar_type() != x.scalar_type()};
}

inline void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
inline unsigned* ticket_pointer(const Counters& tickets) { return tickets.get(); }

// Launches. Tensors that are not defined are not wanted, or absent; vectors must be contiguous.

struct Pooled {
  Tensor context;  // in x's type or the accumulation type
  Tensor logits;   // kMask
  Tensor state;
};

// kMask: `vector` is the mask weight, and out.logits are written; kLogits: `vector` is the logits.
void run_pool(const FeatureMap& x, Weighting weighting, const Tensor& vector, const Tensor& bias, double factor,
              const Pooled& out);

struct PoolGradients {
  Tensor x, logits, mask_weight;
};
struct PoolBackwardInputs {
  Tensor grad_context, mask_weight, logits, state;
  Tensor grad, scale;  // of a whole block; grad in x's layout
};
void run_pool_backward(PoolGradient gradient, const FeatureMap& x, const PoolBackwardInputs& in,
                       const PoolGradients& out);

void run_broadcast(const FeatureMap& x, const Tensor& scale, const Tensor& term, const Tensor& out);

struct BroadcastGradients {
  Tensor x, scale, term;
};
void run_broadcast_mul_backward(const FeatureMap& x, const Tensor& grad, const Tensor& scale,
                                const BroadcastGradients& out);

}  // namespace gc::cuda
