// Pooling of x = slope (y - mean) + bias, which is never made: pool_forward and pixel_dot that read y.
//
//   logits[n, s]  = (mask_weight * slope) . (y[n, :, s] - mean) + (mask_weight . bias + mask_bias)
//   state[n, c]   = sum_s a[n, s] * (y[n, c, s] - mean[c]),   a as in pool_forward
//   context[n, c] = slope[c] * state[n, c] + bias[c]
//
// The state is kept for the backward pass, which cannot divide by a slope of 0; the context of x is what the transform
// reads. Whoever merges the partial results of an image writes both, so that the transform needs no norm.
//
// Decomposition and traffic: theirs. The newer paths are left out, until they are measured there.
#pragma once

#include "pixel_dot.h"
#include "pool_forward.h"
#include "tail_args.h"

namespace gc {

template <Weighting kWeighting_>
struct NormalizedPoolTraits : PoolForwardTraits<kWeighting_> {
  using Base = PoolForwardTraits<kWeighting_>;
  using Args = NormalizedPoolArgs;
  static constexpr bool kNormalized = true;
  static constexpr KernelKind kKind = Base::kMask      ? KernelKind::kPoolMaskNormalized
                                      : Base::kSoftmax ? KernelKind::kPoolLogitsNormalized
                                                       : KernelKind::kPoolUniformNormalized;
  static constexpr const char* kName = Base::kMask      ? "pool_mask_normalized"
                                       : Base::kSoftmax ? "pool_logits_normalized"
                                                        : "pool_uniform_normalized";
  static constexpr Paths kPlannedPaths = {};

  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk& walk, bool /*dots_given*/) {
    take_pool_shared<NormalizedPoolTraits, A>(arena, tile, walk);
  }
};

struct NormalizedPixelDotTraits : PixelDotTraits {
  using Args = NormalizedPixelDotArgs;
  static constexpr bool kNormalized = true;
  static constexpr KernelKind kKind = KernelKind::kPixelDotNormalized;
  static constexpr const char* kName = "pixel_dot_normalized";
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
namespace gc {

template <Weighting kWeighting, typename T, typename Map>
GC_DEVICE void write_context(const NormalizedPoolArgs& args, const Map& map, int channel, Acc<T> sum, Acc<T> z) {
  using A = Acc<T>;
  const A context = kWeighting == Weighting::kUniform ? sum * static_cast<A>(args.factor) : sum / z;
  const long long at = map.state0() + kStatistics + channel;
  static_cast<A*>(args.state)[at] = context;
  static_cast<A*>(args.state_of_x)[at] = slope_at<T>(args.norm, channel) * context + bias_at<T>(args.norm, channel);
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
