// From a plan's run-time choices to the kernels' template arguments, and the launch itself. The instantiations are
// those that the kernels' traits name (kernels/traits.h), and plans choose among the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels/args.h"
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

// One instantiation of a kernel on feature maps. KernelTraits: those of the plan's kind, see kernels/traits.h.
template <typename Traits_, typename Element_, Layout kLayout_, int kRows_, int kWidth_>
struct Instance {
  using Traits = Traits_;
  using T = Element_;
  static constexpr Layout kLayout = kLayout_;
  static constexpr int kRows = kRows_, kWidth = kWidth_;
};

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

// Calls body(Instance) as the plan says, for a plan of this kind. The types are named in functions of their own, and
// not in nested lambdas, where g++ 12 loses them.
template <typename Traits, typename T, Layout kLayout, int kWidth, typename Body>
cudaError_t dispatch_rows(const Plan& plan, const Body& body) {
  if (plan.rows == Traits::kRows) return body(Instance<Traits, T, kLayout, Traits::kRows, kWidth>{});
  if constexpr (has_tall_tiles<Traits>(kLayout, sizeof(T))) {
    if (plan.rows == Traits::kTallRows) return body(Instance<Traits, T, kLayout, Traits::kTallRows, kWidth>{});
  }
  return cudaErrorInvalidValue;
}

template <typename Traits, typename T, typename Body>
cudaError_t dispatch_layout(const Plan& plan, const Body& body) {
  return dispatch_width<kElements<T>>(plan.width, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if constexpr (has_width<Traits>(kWidth, kElements<T>)) {
      return plan.layout == Layout::kNCHW ? dispatch_rows<Traits, T, Layout::kNCHW, kWidth>(plan, body)
                                          : dispatch_rows<Traits, T, Layout::kNHWC, kWidth>(plan, body);
    }
    return cudaErrorInvalidValue;
  });
}

template <typename Traits, typename Body>
cudaError_t dispatch_kind(const Plan& plan, const Body& body) {
  return dispatch_type(plan.type,
                       [&](auto type) { return dispatch_layout<Traits, typename decltype(type)::type>(plan, body); });
}

// Calls body(Instance) as the plan says, for a plan of one of these kinds and ways.
template <typename... Kinds, typename Body>
cudaError_t dispatch(const Plan& plan, const Body& body) {
  cudaError_t status = cudaErrorInvalidValue;
  ((plan.kind == Kinds::kKind && plan.paths.without(Kinds::kPlannedPaths) == Kinds::kPaths &&
    (status = dispatch_kind<Kinds>(plan, body), true)) ||
   ...);
  return status;
}

// One instantiation of a kernel's flat form.
template <typename Traits_, typename Element_>
struct FlatInstance {
  using Traits = Traits_;
  using T = Element_;
};

// The same for the plan of a flat form: calls body(FlatInstance).
template <typename... Kinds, typename Body>
cudaError_t dispatch_flat(const Plan& plan, const Body& body) {
  return dispatch_type(plan.type, [&](auto type) {
    cudaError_t status = cudaErrorInvalidValue;
    ((plan.kind == Kinds::kKind && plan.paths.without(Kinds::kPlannedPaths) == Kinds::kPaths &&
      (status = body(FlatInstance<Kinds, typename decltype(type)::type>{}), true)) ||
     ...);
    return status;
  });
}

// For a launch that begins early: a matrix of so many elements.
inline void add_prefetch(Prefetches& all, const Companion& matrix, int64_t elements, ElementType type) {
  const int64_t bytes = elements * (matrix.wide ? accumulation_bytes(type) : element_bytes(type));
  all.begin[all.count] = matrix.data;
  all.lines[all.count++] = static_cast<unsigned>((bytes + kCacheLine - 1) / kCacheLine);
}

// A launch that may begin while the one before it on the stream ends. In a graph it gets a programmatic edge, which
// CUDA has since 12.3; a driver may be older.
template <typename Args>
cudaError_t launch_early([[maybe_unused]] void (*kernel)(Args), [[maybe_unused]] dim3 grid,
                         [[maybe_unused]] int threads, [[maybe_unused]] int shared_bytes,
                         [[maybe_unused]] const Args& args, [[maybe_unused]] cudaStream_t stream) {
#if CUDART_VERSION >= 12030
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
#else
  return cudaErrorNotSupported;
#endif
}

// early: see launch_early. The kernel waits for the launch before, and this launch is not its operator's first.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, const Args& args,
                   cudaStream_t stream, bool early) {
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (status != cudaSuccess) return status;
  }
  if (early) {
    if (launch_early(kernel, grid, threads, shared_bytes, args, stream) == cudaSuccess) return cudaSuccess;
    static_cast<void>(cudaGetLastError());  // the plain launch does without, or has the same error
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), const Plan& plan, Args args, cudaStream_t stream) {
  args.walk = plan.walk;
  const dim3 grid(static_cast<unsigned>(plan.grid_x()), static_cast<unsigned>(plan.grid_y()));
  return launch(kernel, grid, plan.threads(), plan.shared_bytes, args, stream, plan.paths.has(Path::kEarlyStart));
}

}  // namespace gc
