// What every operator demands of its arguments before a pointer is taken, on any device. For most public functions
// gc_cuda/ops/checks.py has said the same before, in the user's words; for the whole block it says so only after one of
// these has failed: what passes here is computed.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace gc {

inline at::ScalarType accumulation_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline bool is_served(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

// Whether a tensor's type may travel with x: x's own, or that of its sums.
inline bool type_fits(const at::Tensor& tensor, const at::Tensor& x) {
  return tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == accumulation_type(x.scalar_type());
}

inline void check_feature_map(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 4, name, " must have shape [N, C, H, W], got ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(is_served(type), name, " must be float32, float16, bfloat16 or float64, got ", type);
  TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name,
              " must have at least one channel and one pixel, got shape ", x.sizes());
}

// A tensor that travels with x: same device, `count` elements, x's type or its accumulation type.
inline void check_companion(const at::Tensor& tensor, const char* name, const at::Tensor& x, int64_t count) {
  TORCH_CHECK(tensor.device() == x.device(), name, " must be on ", x.device(), " like x, got ", tensor.device());
  TORCH_CHECK_TYPE(type_fits(tensor, x), name, " must be ", x.scalar_type(), " like x, or ",
                   accumulation_type(x.scalar_type()), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " elements, got shape ", tensor.sizes());
}

// One that an earlier operator has left, in the accumulation type.
inline void check_accumulated(const at::Tensor& tensor, const char* name, const at::Tensor& x, int64_t count) {
  check_companion(tensor, name, x, count);
  const at::ScalarType type = accumulation_type(x.scalar_type());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
}

inline void check_kept(const at::Tensor& kept, const at::Tensor& x, int64_t count) {
  check_accumulated(kept, "kept", x, count);
  TORCH_CHECK(kept.is_contiguous(), "kept must be contiguous, got strides ", kept.strides());
}

// A matrix of a 1x1 convolution: [rows, columns], where trailing dimensions of size 1 do not matter.
inline void check_matrix(const at::Tensor& tensor, const char* name, const at::Tensor& x, int64_t rows,
                         int64_t columns) {
  check_companion(tensor, name, x, rows * columns);
  TORCH_CHECK(tensor.dim() >= 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must have shape [",
              rows, ", ", columns, "] or [", rows, ", ", columns, ", 1, 1], got ", tensor.sizes());
}

// The mask of attention pooling; average pooling has neither of the two.
inline void check_mask(const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                       const at::Tensor& x) {
  TORCH_CHECK(weight.has_value() || !bias.has_value(), "mask_bias must be None without a mask_weight");
  if (weight.has_value()) check_companion(*weight, "mask_weight", x, x.size(1));
  if (bias.has_value()) check_companion(*bias, "mask_bias", x, 1);
}

inline void check_epsilon(double eps) {
  TORCH_CHECK(eps >= 0, "eps must be 0 or more, got ", eps);  // NaN is not
}

// A second feature map, a gradient say: x's own shape, type and device.
inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  TORCH_CHECK(tensor.sizes() == x.sizes(), name, " must have shape ", x.sizes(), " like x, got ", tensor.sizes());
  TORCH_CHECK(tensor.device() == x.device(), name, " must be on ", x.device(), " like x, got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, " must be ", x.scalar_type(), " like x, got ",
                   tensor.scalar_type());
}

}  // namespace gc
