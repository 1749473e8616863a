// The norm of the residual tail, as its drivers give it to the kernels.
#pragma once

#include "cuda/kernels/tail_args.h"
#include "feature_map.h"

namespace gc::drivers {

// None; as it is given, with a variance; as it is kept, with an inverse deviation and all in the accumulation type.
enum class NormSource { kNone, kGiven, kKept };

inline constexpr NormSource kNormSources[] = {NormSource::kNone, NormSource::kGiven, NormSource::kKept};

inline const char* name_of(NormSource source) {
  return source == NormSource::kNone ? "no_norm" : source == NormSource::kGiven ? "given" : "kept";
}

template <typename T>
struct Norm {
  using A = Acc<T>;

  NormSource source;
  int channels;
  bool wide;
  double eps = 1e-3;
  bool all_wide = wide || source == NormSource::kKept;

  SmallVector<T> running_mean{"mean", static_cast<std::size_t>(channels), all_wide, Use::kInput};
  SmallVector<T> variance{"variance", static_cast<std::size_t>(channels), wide, Use::kInput};
  SmallVector<T> kept_inverse{"inverse_std", static_cast<std::size_t>(channels), true, Use::kInput};
  SmallVector<T> weight{"weight", static_cast<std::size_t>(channels), wide, Use::kInput};
  SmallVector<T> own_bias{"bias", static_cast<std::size_t>(channels), all_wide, Use::kInput};

  // Means that are far from 0 beside the deviations of about 1, of either sign.
  Norm(NormSource source_, int channels_, bool wide_) : source(source_), channels(channels_), wide(wide_) {
    Numbers numbers(21);
    for (int c = 0; c < channels; ++c) {
      running_mean.set(c, (c % 2 == 0 ? 50 : -50) + numbers(4));
      variance.set(c, 1.5 + numbers(1));
      kept_inverse.set(c, 1.25 + numbers(0.5));
    }
    weight.fill(numbers, 1);
    own_bias.fill(numbers, 1);
  }

  // y, whose channels have about these means.
  void fill(FeatureMap<T>& y, const Shape& shape) const {
    Numbers numbers(22);
    for (int n = 0; n < shape.images; ++n) {
      for (int c = 0; c < shape.channels; ++c) {
        for (int s = 0; s < shape.pixels; ++s) y.set(n, c, s, mean(c) + numbers(2) + 0.25);
      }
    }
  }

  NormArgs args() const {
    NormArgs args{};
    if (source == NormSource::kNone) return args;
    args.mean = running_mean.companion();
    if (source == NormSource::kGiven) {
      args.variance = variance.companion();
      args.eps = eps;
    } else {
      args.inverse_std = kept_inverse.companion();
    }
    args.weight = weight.companion();
    args.bias = own_bias.companion();
    return args;
  }

  bool none() const { return source == NormSource::kNone; }
  double mean(int c) const { return none() ? 0 : running_mean[c]; }
  double inverse_std(int c) const {
    if (none()) return 1;
    return source == NormSource::kKept ? kept_inverse[c] : 1 / std::sqrt(variance[c] + eps);
  }
  double slope(int c) const { return none() ? 1 : weight[c] * inverse_std(c); }
  double bias(int c) const { return none() ? 0 : own_bias[c]; }
};

}  // namespace gc::drivers
