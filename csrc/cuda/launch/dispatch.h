// From a plan's run-time choices to the kernels' template arguments, and the launch itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels/numeric.h"
#include "cuda/launch/shared_memory.h"
#include "cuda/plan/plan.h"

namespace gc {

template <typename T>
struct Type {
  using type = T;
};
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// Tiles of 16 rows a thread instead of 8: for NCHW with many channels, where they make longer segments of pixels. Only
// for float32: what a thread computes from 16 vectors of the other types does not fit its registers.
template <typename T, Layout kLayout>
inline constexpr bool has_tall_tiles = kLayout == Layout::kNCHW && sizeof(T) == sizeof(float);

// Calls body(Constant<width>) for a power of two up to kMax: a width, or another number of such a kind.
template <int kMax, typename Body>
cudaError_t dispatch_width(int width, const Body& body) {
  if constexpr (kMax > 1) {
    if (width < kMax) return dispatch_width<kMax / 2>(width, body);
  }
  return body(Constant<kMax>{});
}

// Calls body(Type<T>).
template <typename Body>
cudaError_t dispatch_type(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::kFloat:
      return body(Type<float>{});
    case ElementType::kHalf:
      return body(Type<__half>{});
    case ElementType::kBFloat16:
      return body(Type<__nv_bfloat16>{});
    case ElementType::kDouble:
      return body(Type<double>{});
  }
  return cudaErrorInvalidValue;
}

// Calls body(Type<T>, Constant<layout>, Constant<width>) as the plan says.
template <typename Body>
cudaError_t dispatch(const Plan& plan, const Body& body) {
  const auto with_layout = [&](auto layout) {
    return dispatch_type(plan.type, [&](auto type) {
      return dispatch_width<kElements<typename decltype(type)::type>>(
          plan.width, [&](auto width) { return body(type, layout, width); });
    });
  };
  return plan.layout == Layout::kNCHW ? with_layout(Constant<Layout::kNCHW>{}) : with_layout(Constant<Layout::kNHWC>{});
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, const Args& args,
                   cudaStream_t stream) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), const Plan& plan, Args args, cudaStream_t stream) {
  args.walk = plan.walk;
  const dim3 grid(static_cast<unsigned>(plan.grid_x()), static_cast<unsigned>(plan.grid_y()));
  return launch(kernel, grid, plan.threads(), plan.shared_bytes, args, stream);
}

}  // namespace gc
