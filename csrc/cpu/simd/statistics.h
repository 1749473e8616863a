// What the mean and the variance of each channel are made of. Of the pixels of a split, with a number c near their mean:
//
//   sums[c]    = sum_s (y[c, s] - centre[c])
//   squares[c] = sum_s (y[c, s] - centre[c])^2
//
// y is read once, but for the first pixels of a split, whose mean is the centre. That is one of the numbers themselves,
// as it were: were it d standard deviations off the mean, the k pixels that it is the mean of would make d at most
// sqrt(n / k). So the mean square loses no more than a factor n / k of its digits by being taken around the centre, even
// in the worst case, and nothing at all in the usual one; around 0 it would lose (mean / deviation)^2.
#pragma once

#include <cmath>

#include "cpu/simd/channel_sums.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
struct DeviationTerms {
  const T* y;

  GC_INLINE void fetch(int64_t j) const { __builtin_prefetch(y + j); }

  template <bool kPartial, bool kStream>
  GC_INLINE void take(int64_t j, int count, const Lanes<T>& centre, Lanes<T>& first, Lanes<T>& second) const {
    using L = Lanes<T>;
    L deviation = L::template load<kPartial>(y + j, count).minus(centre);
    if constexpr (kPartial) deviation = L::joined(deviation, L::zero(), count);
    first.add(deviation);
    second.add_product(deviation, deviation);
  }
};

// The plain sum, as far as it is needed for the centre.
template <typename T>
struct PlainTerms {
  const T* y;

  GC_INLINE void fetch(int64_t) const {}

  template <bool kPartial, bool kStream>
  GC_INLINE void take(int64_t j, int count, const Lanes<T>&, Lanes<T>& first, Lanes<T>&) const {
    first.add(Lanes<T>::template load<kPartial>(y + j, count));
  }
};

inline constexpr int64_t kCentrePixels = 512;      // NCHW: of a row
inline constexpr int64_t kCentrePixelsApart = 16;  // channels_last: each of them is a row

template <typename T>
void statistics(const StatisticsArgs<T>& args, int64_t split_begin, int64_t split_end) {
  using A = acc_t<T>;
  const Shape& shape = args.shape;
  const int64_t most = shape.channels_last ? kCentrePixelsApart : kCentrePixels;
  for (int64_t k = split_begin; k < split_end; ++k) {
    const Split split = split_at(shape, args.plan, k);
    A* const centre = args.centre + k * shape.channels;
    const int64_t count = std::min(split.end - split.begin, most);
    const Split first{split.image, split.begin, split.begin + count};
    channel_sums<T>(PlainTerms<T>{args.y}, nullptr, false, shape, first, nullptr, centre, nullptr);
    for (int64_t c = 0; c < shape.channels; ++c) {
      centre[c] /= static_cast<A>(count);
      if (!std::isfinite(centre[c])) centre[c] = 0;  // the sums become infinite or NaN as they should
    }
    channel_sums<T>(DeviationTerms<T>{args.y}, nullptr, false, shape, split, centre, args.sums + k * shape.channels,
                    args.squares + k * shape.channels);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
