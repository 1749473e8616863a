// out = x * scale + term with a scale and a term per image and channel: every element is read once and written once.
#pragma once

#include <tuple>

#include "cpu/simd/rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
void broadcast(const BroadcastArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  using A = acc_t<T>;
  const int64_t channels = args.shape.channels;
  const Factor<A> scale{args.scale, channels};
  const Factor<A> term{args.term, channels};
  const auto write = [&](const auto& factors, const auto& combine) {
    constexpr size_t kFactors = std::tuple_size_v<std::decay_t<decltype(factors)>>;
    write_units(WriteArgs<T, 0, kFactors>{args.shape, {}, factors, args.x, args.out, args.stream}, unit_begin, unit_end,
                combine);
  };
  if (args.scale && args.term) {
    write(Factors<A, 2>{scale, term},
          [](const auto&, const auto& channel, const auto& x) { return channel[1].plus_product(x, channel[0]); });
  } else if (args.scale) {
    write(Factors<A, 1>{scale}, [](const auto&, const auto& channel, const auto& x) { return x.times(channel[0]); });
  } else {
    write(Factors<A, 1>{term}, [](const auto&, const auto& channel, const auto& x) { return x.plus(channel[0]); });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
