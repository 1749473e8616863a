// Sums of a few vectors, in their order: what parts of the work have left behind, one element of the result at a time.
#pragma once

#include "cpu/vec/lanes.h"

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
    for_each_run<V::size()>(column, end, [&](int64_t j, int count, auto) {
      V sum(A(0));
      for (int64_t k = 0; k < args.members; ++k) sum = sum + V::loadu(in + k * args.width + j, count);
      sum.store(args.out + group * args.width + j, count);
    });
    element += end - column;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
