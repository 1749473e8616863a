// The kernels of the machine at hand, and the step from a dtype known at run time to one known at compile time.
#pragma once

#include <ATen/ATen.h>

#include "cpu/kernels.h"

namespace gc::cpu {

// The best set that both this build and this machine have. ATEN_CPU_CAPABILITY=default|avx2|avx512 chooses another, as
// it does for PyTorch's own kernels.
const KernelSet& kernel_set();

template <typename T>
const Kernels<T>& kernels() {
  const KernelSet& set = kernel_set();
  if constexpr (std::is_same_v<T, float>) return set.float32;
  if constexpr (std::is_same_v<T, double>) return set.float64;
  if constexpr (std::is_same_v<T, at::Half>) return set.float16;
  if constexpr (std::is_same_v<T, at::BFloat16>) return set.bfloat16;
}

// Calls body(T{}) with the T of a type that check_feature_map has let pass.
template <typename Body>
auto dispatch(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kDouble:
      return body(double{});
    case at::kHalf:
      return body(at::Half{});
    case at::kBFloat16:
      return body(at::BFloat16{});
    default:
      return body(float{});
  }
}

}  // namespace gc::cpu
