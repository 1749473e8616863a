// The transforms of the whole block: their parameters, and the steps that both of them take together.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <functional>
#include <vector>

#include "cpu/feature_map.h"
#include "cpu/run.h"

namespace gc::cpu {

enum Parameter { kW1, kB1, kNormWeight, kNormBias, kW2, kB2, kParameters };

// Memory that lives as long as one call of an operator.
template <typename A>
class Scratch {
 public:
  explicit Scratch(const at::TensorOptions& options) : options_(options) {}

  A* take(int64_t count) {
    tensors_.push_back(at::empty({count}, options_));
    return tensors_.back().template data_ptr<A>();
  }

  // A small tensor in the accumulation type: as it is, or else a wider copy.
  template <typename T>
  const A* widened(const at::Tensor& tensor) {
    tensors_.push_back(tensor.contiguous());
    const at::Tensor& dense = tensors_.back();
    if (dense.scalar_type() == options_.dtype().toScalarType()) return dense.template data_ptr<A>();
    const T* in = dense.template data_ptr<T>();
    A* out = take(dense.numel());
    kernels<T>().widen(in, out, tensor.numel());
    return out;
  }

 private:
  at::TensorOptions options_;
  std::vector<at::Tensor> tensors_;
};

// Part of a parallel step: calls(begin, end) on ranges of 0..count.
struct Share {
  int64_t count;
  std::function<void(int64_t, int64_t)> calls;
};

// All shares in one parallel region, one after the other in its range; `elements` of work to each item.
inline void run_together(const std::vector<Share>& shares, int64_t elements) {
  int64_t total = 0;
  for (const Share& share : shares) total += share.count;
  parallel(total, elements, [&](int64_t begin, int64_t end) {
    for (const Share& share : shares) {
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, share.count);
      if (first < last) share.calls(first, last);
      begin -= share.count;
      end -= share.count;
    }
  });
}

// The transform of channel_add or channel_mul; planes = 0 where it is absent.
struct Branch {
  int64_t planes = 0;
  std::array<at::Tensor, kParameters> parameters;  // contiguous

  Branch(at::TensorList given, const char* name, const std::array<const char*, kParameters>& names,
         const at::Tensor& x) {
    if (given.empty()) return;
    TORCH_CHECK(given.size() == kParameters, name,
                " must be empty or hold six tensors (w1, b1, norm_weight, norm_bias, w2, b2), got ", given.size());
    const int64_t channels = x.size(1);
    planes = given[kB1].numel();
    TORCH_CHECK(planes > 0, names[kB1], " must have at least one element, got shape ", given[kB1].sizes());
    const int64_t sizes[kParameters] = {planes * channels, planes, planes, planes, channels * planes, channels};
    for (int i = 0; i < kParameters; ++i) {
      check_companion(given[i], names[i], x, sizes[i]);
      parameters[i] = given[i].contiguous();
    }
  }
};

struct Branches {
  std::array<Branch, 2> each;  // add, mul

  Branches(at::TensorList add, at::TensorList mul, const at::Tensor& x)
      : each{Branch(add, "add", {"add.w1", "add.b1", "add.norm_weight", "add.norm_bias", "add.w2", "add.b2"}, x),
             Branch(mul, "mul", {"mul.w1", "mul.b1", "mul.norm_weight", "mul.norm_bias", "mul.w2", "mul.b2"}, x)} {
    TORCH_CHECK(has(0) || has(1), "the block needs an add or a mul branch, got neither");
  }

  bool has(int b) const { return each[b].planes > 0; }
  int64_t planes() const { return each[0].planes + each[1].planes; }
  int64_t count() const { return has(0) + has(1); }
  // Where a branch's part of `normalized` begins, per image; and its row of `inverse_deviation`.
  int64_t planes_before(int b) const { return b == 0 ? 0 : each[0].planes; }
  int64_t row(int b) const { return b == 1 && has(0); }
};

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
                   int64_t images, int64_t rows, int64_t columns, bool sigmoid) {
  return with_weight<T>(weight, [&](auto* data) {
    using W = std::remove_pointer_t<decltype(data)>;
    const LinearArgs<W> args{data, bias, in, out, images, rows, columns, in_stride, sigmoid};
    return Share{divide_up(rows, kLinearRows),
                 [args](int64_t begin, int64_t end) { kernels<W>().linear(args, begin, end); }};
  });
}

inline int64_t chunk_rows(const at::Tensor& weight, int64_t rows) {
  return chunk_rows(rows, weight.numel() / rows, weight.element_size());
}
inline int64_t chunks(const at::Tensor& weight, int64_t rows) { return divide_up(rows, chunk_rows(weight, rows)); }

// The gradients of weight (where defined) and of in (where not null: a part per chunk) as a share of a step
template <typename T>
Share linear_backward_share(const at::Tensor& weight, const acc_t<T>* grad, const acc_t<T>* in, int64_t in_stride,
                            const at::Tensor& grad_weight, acc_t<T>* grad_in, int64_t images, int64_t rows) {
  return with_weight<T>(weight, [&](auto* data) {
    using W = std::remove_pointer_t<decltype(data)>;
    const LinearBackwardArgs<W> args{data,      grad,
                                     in,        grad_weight.defined() ? grad_weight.data_ptr<W>() : nullptr,
                                     grad_in,   images,
                                     rows,      weight.numel() / rows,
                                     in_stride, chunk_rows(weight, rows)};
    return Share{chunks(weight, rows),
                 [args](int64_t begin, int64_t end) { kernels<W>().linear_backward(args, begin, end); }};
  });
}

}  // namespace gc::cpu
