// The last step of the backward pass of the residual tail with statistics of the batch:
//
//   grad_y[c, s] = grad[c, s] * scale[c] + (y[c, s] - mean[c]) * curve[c] + term[c]
//                  + a[s] * grad_context[c] + dl[s] * mask_weight[c]
//
// the last two where the pooling has a mask. Without statistics of the batch it is grad_x.h's or broadcast.h's.
#pragma once

#include "cpu/simd/rows.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
void grad_y(const GradYArgs<T>& args, int64_t strip_begin, int64_t strip_end) {
  using A = acc_t<T>;
  const int64_t channels = args.shape.channels, pixels = args.shape.pixels;
  WriteArgs<T, 2> write{};
  write.shape = args.shape;
  write.in = {args.grad, args.y};
  write.out = args.grad_y;
  write.stream = args.stream;
  write.strip_begin = strip_begin;
  write.strip_end = strip_end;
  const Factor<A> scale{args.scale, channels}, mean{args.mean, 0}, curve{args.curve, 0}, term{args.term, channels};
  const auto of_maps = [](const auto& channel, const auto& in) {
    return channel[3].plus_product(in[0], channel[0]).plus_product(in[1].minus(channel[1]), channel[2]);
  };
  if (!args.attention) {
    write_like_x(write, Factors<A, 0>{}, Factors<A, 4>{scale, mean, curve, term},
                 [=](const auto&, const auto& channel, const auto& in) { return of_maps(channel, in); });
    return;
  }
  const Factors<A, 2> of_pixel{Factor<A>{args.attention, pixels}, Factor<A>{args.grad_logits, pixels}};
  const Factor<A> grad_context{args.grad_context, channels}, mask_weight{args.mask_weight, 0};
  write_like_x(write, of_pixel, Factors<A, 6>{scale, mean, curve, term, grad_context, mask_weight},
               [=](const auto& pixel, const auto& channel, const auto& in) {
                 return of_maps(channel, in).plus_product(pixel[0], channel[4]).plus_product(pixel[1], channel[5]);
               });
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
