// The transforms of the whole block: the steps that both branches take together.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <vector>

#include "cpu/feature_map.h"
#include "cpu/run.h"

namespace gc::cpu {

// Memory that lives as long as one call of an operator. Small pieces share blocks: each tensor is three allocations.
template <typename A>
class Scratch {
 public:
  explicit Scratch(const at::TensorOptions& options) : options_(options) {}

  A* take(int64_t count) {
    if (count > kBlock / 4) return fresh(count);
    if (count > left_ || !next_) {
      next_ = fresh(kBlock);
      left_ = kBlock;
    }
    A* const taken = next_;
    const int64_t lines = divide_up(count * sizeof(A), kLineBytes) * kLineBytes / sizeof(A);
    next_ += lines;
    left_ -= lines;
    return taken;
  }

  // A small tensor in the accumulation type: as it is, or else a wider copy; null if it is not defined.
  template <typename T>
  const A* widened(const at::Tensor& tensor) {
    if (!tensor.defined()) return nullptr;
    tensors_.push_back(tensor.contiguous());
    const at::Tensor& dense = tensors_.back();
    if (dense.scalar_type() == options_.dtype().toScalarType()) return dense.template data_ptr<A>();
    const T* in = dense.template data_ptr<T>();
    A* out = take(dense.numel());
    kernels<T>().widen(in, out, tensor.numel());
    return out;
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kBlock = 64 * 1024 / sizeof(A);

  A* fresh(int64_t count) {
    tensors_.push_back(at::empty({count}, options_));
    return tensors_.back().template data_ptr<A>();
  }

  at::TensorOptions options_;
  std::vector<at::Tensor> tensors_;
  A* next_ = nullptr;  // of the block in use
  int64_t left_ = 0;
};

// Part of a parallel step: calls(begin, end) on ranges of 0..count, `elements` of work to each item.
struct Share {
  int64_t count;
  int64_t elements;
  std::function<void(int64_t, int64_t)> calls;
};

// All shares in one parallel region, one after the other in its range.
inline void run_together(const std::vector<Share>& shares) {
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
