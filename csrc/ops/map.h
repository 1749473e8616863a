// Feature maps and the small vectors that travel with them, as every operator sees them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

#include "ops/checks.h"
#include "ops/policy.h"

namespace gc {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// As at::empty, on x's device, but on the CPU without the dispatcher, which takes longer than the allocation of a small
// tensor.
inline Tensor empty_beside(const Tensor& x, at::IntArrayRef sizes, at::ScalarType type) {
  if (x.is_cpu()) return Tensor(at::detail::empty_cpu(sizes, type));
  return at::empty(sizes, x.options().dtype(type));
}

// For a parameter's gradient: its elements in a row, and the parameter's strides, which for a channels_last 1x1
// convolution differ from those of a plain matrix in dimensions of one element. DDP warns of other strides and copies.
inline Tensor empty_gradient(const Tensor& parameter) {
  if (!parameter.is_contiguous()) return empty_beside(parameter, parameter.sizes(), parameter.scalar_type());
  if (parameter.is_cpu()) {
    return Tensor(at::detail::empty_strided_cpu(parameter.sizes(), parameter.strides(), parameter.scalar_type()));
  }
  return at::empty_strided(parameter.sizes(), parameter.strides(), parameter.options());
}

// A feature map keeps its layout: channels_last stays channels_last, anything that is neither that nor NCHW is copied
// to the nearer of the two. Its device is current while it lives.
class FeatureMap {
 public:
  FeatureMap(const Tensor& x, const char* name) {
    check_feature_map(x, name);
    if (x.is_cuda()) guard_.reset_device(x.device());
    if (!x.is_contiguous()) format_ = x.suggest_memory_format();
    tensor_ = x.contiguous(format_);
    images_ = x.size(0);
    channels_ = x.size(1);
    pixels_ = x.size(2) * x.size(3);
  }

  const Tensor& tensor() const { return tensor_; }
  void* data() const { return tensor_.data_ptr(); }
  at::ScalarType type() const { return tensor_.scalar_type(); }
  int64_t images() const { return images_; }
  int64_t channels() const { return channels_; }
  int64_t pixels() const { return pixels_; }
  bool channels_last() const { return format_ == at::MemoryFormat::ChannelsLast; }

  // Another map, in this one's layout.
  Tensor in_my_layout(const Tensor& other) const { return other.contiguous(format_); }
  // Like x, in x's layout.
  at::TensorOptions like() const { return tensor_.options().memory_format(format_); }
  Tensor empty(at::IntArrayRef sizes) const { return empty_beside(tensor_, sizes, type()); }
  Tensor empty_accumulation(at::IntArrayRef sizes) const {
    return empty_beside(tensor_, sizes, accumulation_type(type()));
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
  int64_t images_, channels_, pixels_;
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
