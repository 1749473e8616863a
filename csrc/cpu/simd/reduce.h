// Sums of partial results, always in the same order:
//
//   out[group, i] = sum_member in[group, member, i]
#pragma once

#include "cpu/simd/cascade.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
void reduce(const ReduceArgs<A>& args, int64_t element_begin, int64_t element_end) {
  using V = Vec<A>;
  for (int64_t element = element_begin; element < element_end;) {
    const int64_t group = element / args.width;
    const int64_t column = element % args.width;
    const int64_t end = std::min(args.width, column + element_end - element);
    const A* in = args.in + group * args.members * args.width;
    for_each_vector<V::size()>(column, end, [&](int64_t j, int count, auto) {
      Cascade<V> sum;
      for (int64_t k = 0; k < args.members; ++k) sum.add(V::loadu(in + k * args.width + j, count));
      sum.total().store(args.out + group * args.width + j, count);
    });
    element += end - column;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
