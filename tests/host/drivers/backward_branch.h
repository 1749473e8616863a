// One branch of a transform's backward pass: what the forward pass and the launch before have left, made up here, and
// plain loops for the gradients.
#pragma once

#include <optional>

#include "partial_sums.h"
#include "transform_cases.h"

namespace gc::drivers {

inline constexpr double kFactor = 0.75;

// What a caller wants.
struct Wanted {
  const char* name;
  TransformDepth depth;
  bool weights = true;  // the gradients of the matrices
  bool vectors = true;  // those of biases and norm
};

// What the launch before has left of grad_out: the partial sums of so many splits, which the transform or the launch
// itself has merged.
struct Left {
  int splits = 1;
  bool by_transform = false;
};

// A value, and the error that a correct kernel may make in it.
struct Bounded {
  double value = 0, error = 0;
};

template <typename T>
struct Branch {
  using A = Acc<T>;

  Wanted wanted;
  TransformCase on;
  int images = on.images, channels = on.channels, hidden;
  bool wide;
  Gate gate;
  std::string name = gate != Gate::kNone ? "mul_" : "add_";

  std::size_t matrix = static_cast<std::size_t>(hidden) * channels;
  std::size_t units = static_cast<std::size_t>(images) * hidden;
  std::size_t outputs = static_cast<std::size_t>(images) * channels;
  SmallVector<T> w1{name + "w1", matrix, wide, Use::kInput};
  SmallVector<T> norm_weight{name + "norm_weight", static_cast<std::size_t>(hidden), wide, Use::kInput};
  SmallVector<T> norm_bias{name + "norm_bias", static_cast<std::size_t>(hidden), !wide, Use::kInput};
  SmallVector<T> w2{name + "w2", matrix, wide, Use::kInput};
  Buffer<A> normalized{name + "normalized", units, Use::kInput};
  Buffer<A> inverse_deviation{name + "inverse_deviation", static_cast<std::size_t>(images), Use::kInput};
  Buffer<A> grad_out{name + "grad_out", outputs, Use::kInput};
  Buffer<A> gate_out{name + "gate_out", outputs, Use::kInput};
  std::optional<PartialSums<T>> partial_out;

  SmallVector<T> grad_w1{name + "grad_w1", matrix, wide, Use::kOutput};
  SmallVector<T> grad_b1{name + "grad_b1", static_cast<std::size_t>(hidden), !wide, Use::kOutput};
  SmallVector<T> grad_norm_weight{name + "grad_norm_weight", static_cast<std::size_t>(hidden), wide, Use::kOutput};
  SmallVector<T> grad_norm_bias{name + "grad_norm_bias", static_cast<std::size_t>(hidden), wide, Use::kOutput};
  SmallVector<T> grad_w2{name + "grad_w2", matrix, wide, Use::kOutput};
  SmallVector<T> grad_b2{name + "grad_b2", static_cast<std::size_t>(channels), !wide, Use::kOutput};
  TransformWorkspace workspace;
  Buffer<A> partial_y{name + "partial_y", static_cast<std::size_t>(workspace.partial_y), Use::kOutput};
  Buffer<A> grad_y{name + "grad_y", static_cast<std::size_t>(workspace.grad_y), Use::kOutput};
  Buffer<A> grad_hidden{name + "grad_hidden", static_cast<std::size_t>(workspace.grad_hidden), Use::kOutput};
  Buffer<A> partial_context{name + "partial_context", static_cast<std::size_t>(workspace.partial_context),
                            Use::kOutput};

  Branch(const Wanted& wanted_, const TransformCase& on_, int hidden_, bool wide_, Gate gate_,
         const TransformWorkspace& workspace_)
      : wanted(wanted_), on(on_), hidden(hidden_), wide(wide_), gate(gate_), workspace(workspace_) {
    Numbers numbers(gate != Gate::kNone ? 9 : 10);
    w1.fill(numbers, 1);
    norm_weight.fill(numbers, 2);
    norm_bias.fill(numbers, 1);
    w2.fill(numbers, 1);
    norm_bias.set(0, 0);
    for (int n = 0; n < images; ++n) inverse_deviation[n] = static_cast<A>(1.5 + numbers(1));
    for (std::size_t i = 0; i < outputs; ++i) {
      grad_out[i] = static_cast<A>(numbers(1));
      gate_out[i] = static_cast<A>(std::min(std::max(0.5 + numbers(0.6), 0.0), 1.0));
    }
    for (std::size_t i = 0; i < units; ++i) {
      const int p = static_cast<int>(i % hidden);
      double value = numbers(2);
      // Rounding must not decide on which side of an edge a unit lies; unit 0 of image 0 is exactly on ReLU's.
      const auto near_edge = [&] {
        const double v = before(p, value);
        return std::min({std::abs(v), std::abs(v - 3), std::abs(v + 3)}) < 1e-3;
      };
      while (near_edge()) value += 0.3;
      normalized[i] = static_cast<A>(i == 0 ? 0 : value);
    }
  }

  // grad_out is then the sum of these.
  void leave(const Left& left) {
    if (left.splits == 1) return;
    partial_out.emplace(name + "partial_out", images, left.splits, channels);
    for (std::size_t i = 0; i < outputs; ++i) grad_out[i] = partial_out->sum(i);
    if (!left.by_transform) partial_out.reset();
  }

  // What goes into the activation.
  double before(int p, double value) const { return on.norm ? norm_weight[p] * value + norm_bias[p] : value; }

  TransformGradients args() {
    TransformGradients args{};
    args.hidden = hidden;
    args.w1 = w1.companion();
    if (on.norm) {
      args.norm_weight = norm_weight.companion();
      args.norm_bias = norm_bias.companion();
    }
    args.w2 = w2.companion();
    args.normalized = normalized.data();
    args.inverse_deviation = inverse_deviation.data();
    args.grad_out = partial_out ? nullptr : grad_out.data();
    args.gate = gate;
    args.gate_out = gate_out.data();
    if (wanted.weights) {
      args.grad_w1 = grad_w1.out();
      args.grad_w2 = grad_w2.out();
    }
    if (wanted.vectors) {
      args.grad_b1 = grad_b1.out();
      args.grad_b2 = grad_b2.out();
    }
    if (wanted.vectors && on.norm) {
      args.grad_norm_weight = grad_norm_weight.out();
      args.grad_norm_bias = grad_norm_bias.out();
    }
    args.partial_y = partial_y.data();
    args.grad_y = grad_y.data();
    args.grad_hidden = grad_hidden.data();
    args.partial_context = partial_context.data();
    return args;
  }

  double before_activation(int n, int p) const {
    return before(p, normalized[static_cast<std::size_t>(n) * hidden + p]);
  }
  double y(int n, int p) const { return activate_of(on.activation, before_activation(n, p)); }
  double dt(int n, int c) const {
    const std::size_t i = static_cast<std::size_t>(n) * channels + c;
    return grad_out[i] * gate_slope_of(gate, gate_out[i]);
  }

  // Checks the gradients, and adds this branch's share to grad_context [N, C] (with its error).
  void check(const Buffer<A>& context, int stride, std::vector<Bounded>& grad_context) const {
    const double roundoff = Element<A>::roundoff;
    std::vector<Bounded> dy(units), dh(units);
    for (int n = 0; n < images; ++n) backward_of_image(n, &dy[static_cast<std::size_t>(n) * hidden], &dh[n * hidden]);
    const bool deep = wanted.depth != TransformDepth::kLastLayer;
    for (int p = 0; p < hidden; ++p) {
      const auto unit = [&](int n) { return static_cast<std::size_t>(n) * hidden + p; };
      if (deep && wanted.vectors) {
        check_sum(grad_b1, p, [&](int n) { return dh[unit(n)]; });
      }
      if (deep && wanted.vectors && on.norm) {
        check_sum(grad_norm_bias, p, [&](int n) { return dy[unit(n)]; });
        check_sum(grad_norm_weight, p, [&](int n) { return times(dy[unit(n)], normalized[unit(n)]); });
      }
      for (int c = 0; c < channels; ++c) {
        if (deep && wanted.weights) {
          check_sum(grad_w1, static_cast<std::size_t>(p) * channels + c,
                    [&](int n) { return times(dh[unit(n)], context[static_cast<std::size_t>(n) * stride + c]); });
        }
        if (wanted.weights) {
          check_sum(grad_w2, static_cast<std::size_t>(c) * hidden + p, [&](int n) {
            return Bounded{dt(n, c) * y(n, p), 8 * roundoff * std::abs(dt(n, c)) * (2 * std::abs(y(n, p)) + 2)};
          });
        }
        for (int n = 0; n < images; ++n) {
          const Bounded part = times(dh[unit(n)], w1[static_cast<std::size_t>(p) * channels + c]);
          Bounded& sum = grad_context[static_cast<std::size_t>(n) * channels + c];
          sum.value += kFactor * part.value;
          sum.error += part.error + sum_error<T>(hidden) * std::abs(part.value);
        }
      }
    }
    for (int c = 0; c < channels && wanted.vectors; ++c) {
      check_sum(grad_b2, c, [&](int n) { return Bounded{dt(n, c), 4 * roundoff * std::abs(dt(n, c))}; });
    }
  }

 private:
  static Bounded times(const Bounded& a, double b) { return {a.value * b, a.error * std::abs(b)}; }

  // got[i] must be the sum over the images of term(n).
  template <typename Term>
  void check_sum(const SmallVector<T>& got, std::size_t i, const Term& term) const {
    Bounded sum;
    for (int n = 0; n < images; ++n) {
      const Bounded one = term(n);
      sum.value += one.value;
      sum.error += one.error + sum_error<T>(images) * std::abs(one.value);
    }
    got.with_buffer([&](const auto& buffer) {
      host::require_close(buffer.name(), got[i], sum.value, sum.error + got.store_error(sum.value));
    });
  }

  void backward_of_image(int n, Bounded* dy, Bounded* dh) const {
    const double roundoff = Element<A>::roundoff;
    Bounded mean, product_mean;
    for (int p = 0; p < hidden; ++p) {
      dy[p] = {};
      const double v = before_activation(n, p), slope = slope_of(on.activation, v);
      for (int c = 0; c < channels; ++c) {
        const double part = w2[static_cast<std::size_t>(c) * hidden + p] * dt(n, c);
        dy[p].value += slope * part;
        dy[p].error += (sum_error<T>(channels) + 4 * roundoff) * std::abs(slope * part);
        // The slope's own error; ReLU has none.
        if (on.activation != Activation::kReLU) dy[p].error += 8 * roundoff * (1 + std::abs(v)) * std::abs(part);
      }
      if (!on.norm) {
        dh[p] = dy[p];
        continue;
      }
      const Bounded dn = times(dy[p], norm_weight[p]);
      const Bounded product = times(dn, normalized[static_cast<std::size_t>(n) * hidden + p]);
      mean.value += dn.value / hidden;
      mean.error += (dn.error + sum_error<T>(hidden) * std::abs(dn.value)) / hidden;
      product_mean.value += product.value / hidden;
      product_mean.error += (product.error + sum_error<T>(hidden) * std::abs(product.value)) / hidden;
    }
    for (int p = 0; p < hidden && on.norm; ++p) {
      const double x = normalized[static_cast<std::size_t>(n) * hidden + p];
      const Bounded dn = times(dy[p], norm_weight[p]);
      const Bounded product = times(product_mean, x);
      const double size = std::abs(dn.value) + std::abs(mean.value) + std::abs(product.value);
      dh[p] =
          times({dn.value - mean.value - product.value, dn.error + mean.error + product.error + 8 * roundoff * size},
                inverse_deviation[n]);
    }
  }
};

}  // namespace gc::drivers
