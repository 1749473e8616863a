// out[c, s] = x[c, s] * scale[c] + term[c]
//
// Every element is read once and written once.
#pragma once

#include "cpu/simd/rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
void broadcast(const BroadcastArgs<T>& args, int64_t strip_begin, int64_t strip_end) {
  using A = acc_t<T>;
  WriteArgs<T> write{};
  write.shape = args.shape;
  write.in = {args.x};
  write.out = args.out;
  write.stream = args.stream;
  write.strip_begin = strip_begin;
  write.strip_end = strip_end;
  const Factors<A, 0> none{};
  const Factor<A> scale{args.scale, args.shape.channels};
  const Factor<A> term{args.term, args.shape.channels};
  if (args.scale && args.term) {
    write_like_x(write, none, Factors<A, 2>{scale, term}, [](const auto&, const auto& channel, const auto& x) {
      return channel[1].plus_product(x, channel[0]);
    });
  } else if (args.scale) {
    write_like_x(write, none, Factors<A, 1>{scale},
                 [](const auto&, const auto& channel, const auto& x) { return x.times(channel[0]); });
  } else {
    write_like_x(write, none, Factors<A, 1>{term},
                 [](const auto&, const auto& channel, const auto& x) { return x.plus(channel[0]); });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
