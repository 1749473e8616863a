// The kernels of one instruction set, as a table.
#pragma once

#include "cpu/simd/broadcast.h"
#include "cpu/simd/broadcast_backward.h"
#include "cpu/simd/grad_x.h"
#include "cpu/simd/pool.h"
#include "cpu/simd/reduce.h"
#include "cpu/simd/transform.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
constexpr Kernels<T> make_kernels() {
  using A = acc_t<T>;
  return {pool<T>,
          pool_merge<T>,
          pool_backward<T>,
          pool_backward_balance<T>,
          broadcast_backward<T>,
          broadcast<T>,
          grad_x<T>,
          reduce<A>,
          linear<T>,
          linear_backward<T>,
          normalize<A>,
          activate<A>,
          normalize_backward<A>,
          gate_backward<A>,
          widen<T>,
          narrow<T>};
}

// Constant, so that nothing of this instruction set runs when the library is loaded.
inline constexpr KernelSet kKernelSet{make_kernels<float>(), make_kernels<double>(), make_kernels<c10::Half>(),
                                      make_kernels<c10::BFloat16>()};

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
