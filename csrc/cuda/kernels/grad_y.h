// The last step of the residual tail's backward pass: the gradient of y, in one launch. With slope = weight *
// inverse_std, M = N * S and g, what the ReLU has let through (residual_sums),
//
//   grad_y = slope * (g * scale[n, c]                                               or g, without channel_mul
//                     + attention[s] * grad_context[n, c] + grad_logits[s] * mask_weight[c]      with attention
//                     + grad_context[n, c] / S                                      with average pooling
//                     - (grad_bias[c] + (y - mean) * inverse_std * grad_weight[c]) / M)   with statistics of the batch
//
// g, y, grad_y [N, C, S] or [N, S, C]; attention, grad_logits [N, S].
//
// Decomposition: block (image * splits + split, chunk) walks the tiles of its split for its chunk of channels. What a
// channel needs of the vectors is worked out once and kept in registers. Without statistics of the batch the gradients of
// the norm's parameters are computed here, too: by the first warps of the blocks, before their tiles (norm_gradients.h).
// One instantiation serves all of the formula: what is absent is 0, and its map is not read.
//
// Moves: g and grad_y once, with statistics of the batch y once (N*C*S elements each); with attention, 2 * N*S values for
// each chunk of channels.
#pragma once

#include "norm_gradients.h"
#include "traits.h"

namespace gc {

struct GradYTraits : KernelTraits {
  static constexpr KernelKind kKind = KernelKind::kGradY;
  static constexpr const char* kName = "grad_y";
  static constexpr int kRows = 4;  // of two maps
  static constexpr int kWaves = 4;
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "tile.h"

namespace gc {

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
grad_y(const GradYArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;
  static_assert(has_tile<GradYTraits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  const typename TileT::Map map(args.walk);
  const bool of_batch = args.y != nullptr;
  const bool attends = args.attention != nullptr;
  if (!of_batch) {
    // Warp by warp over the blocks, for none is to have much more to do than others.
    const int blocks = port::grid_x() * port::grid_y();
    const int warp = port::thread_index() / kWarp * blocks + port::block_y() * port::grid_x() + port::block_x();
    norm_gradients_of<T>(args.beside, warp, port::block_threads() / kWarp * blocks);
  }

  A scale[kChannels];   // of g
  A term[kChannels];    // for every pixel
  A direct[kChannels];  // of attention
  A weight[kChannels];  // of grad_logits
  A curve[kChannels];   // of y - mean
  A mean[kChannels];
  GC_UNROLL
  for (int i = 0; i < kChannels; ++i) {
    scale[i] = term[i] = direct[i] = weight[i] = curve[i] = mean[i] = 0;
    const int c = map.channel(i);
    if (c >= map.channels) continue;
    const long long nc = map.channels0() + c;
    const A slope = slope_at<T>(args.norm, c);
    scale[i] = args.scale != nullptr ? slope * static_cast<const A*>(args.scale)[nc] : slope;
    const A grad_context = args.grad_context != nullptr ? static_cast<const A*>(args.grad_context)[nc] : A(0);
    if (attends) {
      direct[i] = slope * grad_context;
      weight[i] = slope * read<T>(args.mask_weight, c);
    } else {
      term[i] = grad_context / static_cast<A>(map.pixels);
    }
    if (of_batch) {
      const A count = static_cast<A>(args.walk.images) * static_cast<A>(map.pixels);
      const A inverse_std = inverse_std_at<T>(args.norm, c);
      term[i] -= static_cast<const A*>(args.grad_bias)[c] / count;
      curve[i] = -(slope * inverse_std) * (static_cast<const A*>(args.grad_weight)[c] / count);
      mean[i] = mean_at<T>(args.norm, c);
    }
    if (of_batch || !attends) term[i] *= slope;  // a 0 stays 0, whatever the slope
  }

  for (int tile_index = map.first_tile; tile_index < map.end_tile; ++tile_index) {
    const int pixel0 = tile_index * map.tile_pixels();
    TileT grad, y{};
    grad.load(static_cast<const T*>(args.grad) + map.image0(), map, pixel0);
    if (of_batch) y.load(static_cast<const T*>(args.y) + map.image0(), map, pixel0);
    A attention[kPixels], grad_logit[kPixels];
    GC_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const int pixel = map.pixel(pixel0, p);
      const bool read = attends && pixel < map.pixels;
      attention[p] = read ? static_cast<const A*>(args.attention)[map.pixels0() + pixel] : A(0);
      grad_logit[p] = read ? static_cast<const A*>(args.grad_logits)[map.pixels0() + pixel] : A(0);
    }
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        A v = grad(c, p) * scale[c];
        v += attention[p] * direct[c] + grad_logit[p] * weight[c];
        v += term[c];
        v += curve[c] * (y(c, p) - mean[c]);
        grad.set(c, p, v);
      }
    }
    grad.store(static_cast<T*>(args.grad_y) + map.image0(), map, pixel0);
  }
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
