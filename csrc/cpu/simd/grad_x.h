// The last step of the backward pass of attention pooling:
//
//   grad_x[c, s] = grad[c, s] * scale[c] + a[s] * grad_context[c] + dl[s] * mask_weight[c]
//
// Every element of grad is read once and every element of grad_x is written once. x is not needed, so this is a pass of
// its own: it writes whole rows. Tiles of x are narrow in NCHW, and so would be the rows written along with them.
#pragma once

#include "cpu/simd/rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
void grad_x(const GradXArgs<T>& args, int64_t strip_begin, int64_t strip_end) {
  using A = acc_t<T>;
  const int64_t channels = args.shape.channels, pixels = args.shape.pixels;
  WriteArgs<T> write{};
  write.shape = args.shape;
  write.in = {args.grad};
  write.out = args.grad_x;
  write.stream = args.stream;
  write.strip_begin = strip_begin;
  write.strip_end = strip_end;
  const Factor<A> attention{args.attention, pixels};
  const Factor<A> grad_logits{args.grad_logits, pixels};
  const Factor<A> grad_context{args.grad_context, channels};
  const Factor<A> mask_weight{args.mask_weight, 0};
  const Factor<A> scale{args.scale, channels};
  if (!args.mask_weight) {  // softmax_pool, which has no grad either
    write_like_x(write, Factors<A, 1>{attention}, Factors<A, 1>{grad_context},
                 [](const auto& pixel, const auto& channel, const auto&) { return pixel[0].times(channel[0]); });
    return;
  }
  const Factors<A, 2> of_pixel{attention, grad_logits};
  const Factors<A, 2> of_channel{grad_context, mask_weight};
  const auto pooled = [](const auto& pixel, const auto& channel) {
    return pixel[0].times(channel[0]).plus_product(pixel[1], channel[1]);
  };
  if (!args.grad) {
    write_like_x(write, of_pixel, of_channel,
                 [=](const auto& pixel, const auto& channel, const auto&) { return pooled(pixel, channel); });
  } else if (!args.scale) {
    write_like_x(write, of_pixel, of_channel, [=](const auto& pixel, const auto& channel, const auto& grad) {
      return pooled(pixel, channel).plus(grad);
    });
  } else {
    write_like_x(write, of_pixel, Factors<A, 3>{grad_context, mask_weight, scale},
                 [=](const auto& pixel, const auto& channel, const auto& grad) {
                   return pooled(pixel, channel).plus_product(grad, channel[2]);
                 });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
