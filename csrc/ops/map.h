// Feature maps and the small vectors that travel with them, as every operator sees them.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

#include "ops/checks.h"
#include "ops/policy.h"

namespace gc {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A feature map keeps its layout: channels_last stays channels_last, anything that is neither that nor NCHW is copied to
// the nearer of the two. Its device is current while it lives.
class FeatureMap {
 public:
  FeatureMap(const Tensor& x, const char* name) {
    check_feature_map(x, name);
    if (x.is_cuda()) guard_.reset_device(x.device());
    if (!x.is_contiguous()) format_ = x.suggest_memory_format();
    tensor_ = x.contiguous(format_);
  }

  const Tensor& tensor() const { return tensor_; }
  void* data() const { return tensor_.data_ptr(); }
  at::ScalarType type() const { return tensor_.scalar_type(); }
  int64_t images() const { return tensor_.size(0); }
  int64_t channels() const { return tensor_.size(1); }
  int64_t pixels() const { return tensor_.size(2) * tensor_.size(3); }
  bool channels_last() const { return format_ == at::MemoryFormat::ChannelsLast; }

  // Another map, in this one's layout.
  Tensor in_my_layout(const Tensor& other) const { return other.contiguous(format_); }
  // Like x, in x's layout.
  at::TensorOptions like() const { return tensor_.options().memory_format(format_); }
  Tensor empty(at::IntArrayRef sizes) const { return empty_tensor(sizes, tensor_.options()); }
  Tensor empty_accumulation(at::IntArrayRef sizes) const {
    return empty_tensor(sizes, tensor_.options().dtype(accumulation_type(type())));
  }
  int64_t accumulation_bytes() const { return type() == at::kDouble ? 8 : 4; }

  // A companion's pointer and type; `vector` must be contiguous and outlive its use.
  Companion companion(const Tensor& vector) const {
    if (!vector.defined()) return {};
    return {vector.data_ptr(), vector.scalar_type() != type()};
  }
  CompanionOut companion_out(const Tensor& vector) const {
    if (!vector.defined()) return {};
    return {vector.data_ptr(), vector.scalar_type() != type()};
  }

 private:
  c10::OptionalDeviceGuard guard_;
  at::MemoryFormat format_ = at::MemoryFormat::Contiguous;
  Tensor tensor_;
};

inline Tensor contiguous(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->contiguous() : Tensor(); }
inline void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// A vector in the accumulation type.
inline Companion wide(const void* data) { return {data, data != nullptr}; }
inline CompanionOut wide_out(void* data) { return {data, data != nullptr}; }

// `elements` of that many bytes further on; null stays null.
inline void* after(void* start, int64_t elements, int64_t element_bytes) {
  return start == nullptr ? nullptr : static_cast<char*>(start) + elements * element_bytes;
}
inline const void* after(const void* start, int64_t elements, int64_t element_bytes) {
  return after(const_cast<void*>(start), elements, element_bytes);
}

}  // namespace gc
