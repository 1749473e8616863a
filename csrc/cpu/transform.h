// The transforms of the whole block: the steps that both branches take together.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <functional>

#include "cpu/run.h"

namespace gc::cpu {

// Part of a parallel step: calls(begin, end) on ranges of 0..count, `elements` of work to each item.
struct Share {
  int64_t count;
  int64_t elements;
  std::function<void(int64_t, int64_t)> calls;
};

using Shares = c10::SmallVector<Share, 2>;

// All shares in one parallel region, one after the other in its range.
inline void run_together(const Shares& shares) {
  int64_t total = 0, elements = 0;
  for (const Share& share : shares) {
    total += share.count;
    elements = std::max(elements, share.elements);
  }
  parallel(total, elements, [&](int64_t begin, int64_t end) {
    for (const Share& share : shares) {
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, share.count);
      if (first < last) share.calls(first, last);
      begin -= share.count;
      end -= share.count;
    }
  });
}

// Calls body(pointer) with a weight in its own type: x's type T or the accumulation type.
template <typename T, typename Body>
auto with_weight(const at::Tensor& weight, const Body& body) {
  if constexpr (!std::is_same_v<T, acc_t<T>>) {
    if (weight.scalar_type() == c10::CppTypeToScalarType<T>::value) return body(weight.data_ptr<T>());
  }
  return body(weight.data_ptr<acc_t<T>>());
}

// out = weight in + bias as a share of a step
template <typename T>
Share linear_share(const at::Tensor& weight, const acc_t<T>* bias, const acc_t<T>* in, int64_t in_stride, acc_t<T>* out,
                   int64_t images, int64_t rows, int64_t columns, Gate gate) {
  return with_weight<T>(weight, [&](auto* data) {
    using W = std::remove_pointer_t<decltype(data)>;
    const LinearArgs<W> args{data, bias, in, out, images, rows, columns, in_stride, gate};
    return Share{divide_up(rows, kLinearRows), kLinearRows * columns * images,
                 [args](int64_t begin, int64_t end) { kernels<W>().linear(args, begin, end); }};
  });
}

inline Pieces make_pieces(const at::Tensor& weight, int64_t rows) {
  return make_pieces(rows, weight.numel() / rows, weight.element_size());
}

// The gradients of weight (where defined), of the bias and of in (where not null; of in a part per chunk) as a share of
// a step
template <typename T>
Share linear_backward_share(const at::Tensor& weight, const acc_t<T>* grad, const acc_t<T>* in, int64_t in_stride,
                            const at::Tensor& grad_weight, acc_t<T>* grad_bias, acc_t<T>* grad_in, int64_t images,
                            int64_t rows) {
  return with_weight<T>(weight, [&](auto* data) {
    using W = std::remove_pointer_t<decltype(data)>;
    const LinearBackwardArgs<W> args{data,
                                     grad,
                                     in,
                                     grad_weight.defined() ? grad_weight.data_ptr<W>() : nullptr,
                                     grad_bias,
                                     grad_in,
                                     images,
                                     rows,
                                     weight.numel() / rows,
                                     in_stride,
                                     make_pieces(weight, rows)};
    return Share{args.pieces.count(), divide_up(weight.numel(), args.pieces.count()) * images,
                 [args](int64_t begin, int64_t end) { kernels<W>().linear_backward(args, begin, end); }};
  });
}

}  // namespace gc::cpu
