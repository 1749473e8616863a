// The kernels of one instruction set, as a table.
#pragma once

#include "cpu/simd/broadcast.h"
#include "cpu/simd/broadcast_backward.h"
#include "cpu/simd/grad_x.h"
#include "cpu/simd/grad_y.h"
#include "cpu/simd/linear.h"
#include "cpu/simd/normalize.h"
#include "cpu/simd/pool.h"
#include "cpu/simd/reduce.h"
#include "cpu/simd/residual.h"
#include "cpu/simd/statistics.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
constexpr Kernels<T> make_kernels() {
  using A = acc_t<T>;
  Kernels<T> table{};
  table.pool = pool<T>;
  table.pool_merge = pool_merge<T>;
  table.pool_backward = pool_backward<T>;
  table.pool_backward_balance = pool_backward_balance<T>;
  table.broadcast_backward = broadcast_backward<T>;
  table.statistics = statistics<T>;
  table.residual_sums = residual_sums<T>;
  table.residual = residual<T>;
  table.grad_y = grad_y<T>;
  table.broadcast = broadcast<T>;
  table.grad_x = grad_x<T>;
  table.reduce = reduce<A>;
  table.linear = linear<T>;
  table.linear_backward = linear_backward<T>;
  table.normalize = normalize<A>;
  table.activate = activate<A>;
  table.normalize_backward = normalize_backward<A>;
  table.gate_backward = gate_backward<A>;
  table.widen = widen<T>;
  table.narrow = narrow<T>;
  return table;
}

constexpr KernelSet make_kernel_set() {
  KernelSet set{};
  set.float32 = make_kernels<float>();
  set.float64 = make_kernels<double>();
  set.float16 = make_kernels<c10::Half>();
  set.bfloat16 = make_kernels<c10::BFloat16>();
  return set;
}

// It is a constant, so that nothing of this instruction set runs when the library is loaded.
inline constexpr KernelSet kKernelSet = make_kernel_set();

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
