// The parts of a batch normalization (NormArgs) as kernels read them, one channel at a time. Whoever reads a part
// computes it alike, so that all kernels of a call have the same bits.
#pragma once

#include "tail_args.h"

#if defined(GC_DEVICE_CODE)
#include "numeric.h"

namespace gc {

template <typename T>
GC_DEVICE Acc<T> mean_at(const NormArgs& norm, int channel) {
  return norm.mean.data != nullptr ? read<T>(norm.mean, channel) : Acc<T>(0);
}

template <typename T>
GC_DEVICE Acc<T> inverse_std_at(const NormArgs& norm, int channel) {
  using A = Acc<T>;
  if (norm.variance.data != nullptr) {
    return A(1) / port::sqrt(read<T>(norm.variance, channel) + static_cast<A>(norm.eps));
  }
  return norm.inverse_std.data != nullptr ? read<T>(norm.inverse_std, channel) : A(1);
}

template <typename T>
GC_DEVICE Acc<T> slope_at(const NormArgs& norm, int channel) {
  const Acc<T> inverse_std = inverse_std_at<T>(norm, channel);
  return norm.weight.data != nullptr ? read<T>(norm.weight, channel) * inverse_std : inverse_std;
}

template <typename T>
GC_DEVICE Acc<T> bias_at(const NormArgs& norm, int channel) {
  return norm.bias.data != nullptr ? read<T>(norm.bias, channel) : Acc<T>(0);
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
