// The gradient of x behind attention pooling: grad_x = grad * scale + a * grad_context + dl * mask_weight. a and dl are
// numbers of the pixels, the other three of the channels. Every element of grad is read once, of grad_x written once.
//
// It needs no x, so it is a pass of its own: tiles of x are narrow in NCHW, and so would be the rows of grad and
// grad_x.
#pragma once

#include <tuple>

#include "cpu/simd/rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
void grad_x(const GradXArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  using A = acc_t<T>;
  const int64_t channels = args.shape.channels, pixels = args.shape.pixels;
  const Factor<A> attention{args.attention, pixels};
  const Factor<A> grad_logits{args.grad_logits, pixels};
  const Factor<A> grad_context{args.grad_context, channels};
  const Factor<A> mask_weight{args.mask_weight, 0};
  const Factor<A> scale{args.scale, channels};
  const auto write = [&](const auto& of_pixel, const auto& of_channel, const auto& combine) {
    constexpr size_t kPixel = std::tuple_size_v<std::decay_t<decltype(of_pixel)>>;
    constexpr size_t kChannel = std::tuple_size_v<std::decay_t<decltype(of_channel)>>;
    write_units(WriteArgs<T, kPixel, kChannel>{args.shape, of_pixel, of_channel, args.grad, args.grad_x, args.stream},
                unit_begin, unit_end, combine);
  };
  if (!args.mask_weight) {  // softmax_pool: without a grad
    write(Factors<A, 1>{attention}, Factors<A, 1>{grad_context},
          [](const auto& pixel, const auto& channel, const auto&) { return pixel[0].times(channel[0]); });
    return;
  }
  const auto pooled = [](const auto& pixel, const auto& channel) {
    return pixel[0].times(channel[0]).plus_product(pixel[1], channel[1]);
  };
  const Factors<A, 2> of_pixel{attention, grad_logits};
  if (!args.grad) {
    write(of_pixel, Factors<A, 2>{grad_context, mask_weight},
          [=](const auto& pixel, const auto& channel, const auto&) { return pooled(pixel, channel); });
  } else if (!args.scale) {
    write(of_pixel, Factors<A, 2>{grad_context, mask_weight},
          [=](const auto& pixel, const auto& channel, const auto& grad) { return pooled(pixel, channel).plus(grad); });
  } else {
    write(of_pixel, Factors<A, 3>{grad_context, mask_weight, scale},
          [=](const auto& pixel, const auto& channel, const auto& grad) {
            return pooled(pixel, channel).plus_product(grad, channel[2]);
          });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
