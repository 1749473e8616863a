// What the bindings of the parts and of the whole block share: a feature map on its stream, and the launches on
// tensors. Only the files that include this know torch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "cuda/launch/counters.h"
#include "cuda/launch/launch.h"
#include "ops/checks.h"

namespace gc::cuda {

using at::Tensor;

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
  // For the launches of one call; must live until after them.
  Counters tickets(int64_t count) const { return Counters(count, tensor_.device().index(), stream_); }
  ElementType type() const { return element_type(tensor_.scalar_type()); }
  int device() const { return tensor_.device().index(); }

  // `maps`: every feature map of the launch; their addresses decide on the width of loads and stores.
  Plan plan(KernelKind kind, std::initializer_list<const void*> maps, bool dots_given = false) const;

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
// One that is in the accumulation type.
inline Companion wide(const void* data) { return {data, data != nullptr}; }
inline CompanionOut wide_out(void* data) { return {data, data != nullptr}; }

inline void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }
// `elements` of that type further on.
inline void* behind(void* start, int64_t elements, int64_t element_bytes) {
  return start == nullptr ? nullptr : static_cast<char*>(start) + elements * element_bytes;
}
inline const void* behind(const void* start, int64_t elements, int64_t element_bytes) {
  return behind(const_cast<void*>(start), elements, element_bytes);
}

// What a planned launch wants besides its arguments.
struct Wanted {
  int64_t workspace = 0;  // elements of the accumulation type
  int64_t tickets = 0;
};

// Launches that are planned before anything is allocated, so that those of one call can share their memory. A map with
// more channels than a block holds takes a launch of pixel_dot before. The arguments that the launch itself knows (x,
// partial results, tickets) are left out by the caller. Of no images there is no plan, and nothing is launched.

class PoolForward {
 public:
  PoolForward(const FeatureMap& x, Weighting weighting);
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  void launch(PoolForwardArgs args, void* workspace, unsigned* tickets) const;

 private:
  const FeatureMap& x_;
  std::optional<Plan> dots_;
  Plan plan_{};
};

class PoolBackward {
 public:
  // grad_x, grad: their addresses; null where there is none.
  PoolBackward(PoolGradient gradient, const FeatureMap& x, const void* grad_x, const void* grad);
  Wanted wanted() const { return {plan_.workspace + dots_elements(), plan_.tickets}; }
  void launch(PoolBackwardArgs args, void* workspace, unsigned* tickets) const;

 private:
  int64_t dots_elements() const { return dots_ ? x_.images() * x_.pixels() : 0; }

  const FeatureMap& x_;
  std::optional<Plan> dots_;
  Plan plan_{};
};

class BroadcastMulBackward {
 public:
  // grad, grad_x: their addresses; grad_x null where there is none.
  BroadcastMulBackward(const FeatureMap& x, const void* grad, const void* grad_x);
  Wanted wanted() const { return {plan_.workspace, plan_.tickets}; }
  void launch(BroadcastMulBackwardArgs args, void* workspace, unsigned* tickets) const;

 private:
  const FeatureMap& x_;
  Plan plan_{};
};

// x * scale + term
void launch_broadcast(const FeatureMap& x, Companion scale, Companion term, void* out);

}  // namespace gc::cuda
