// transform_backward (csrc/cuda/kernels/transform_backward.h) against plain loops. What the forward pass leaves behind
// is made up here.
#include "accuracy.h"
#include "transform_cases.h"

namespace gc::drivers {
namespace {

constexpr double kFactor = 0.75;

// What a caller wants.
struct Wanted {
  const char* name;
  TransformDepth depth;
  bool weights = true;  // the gradients of the matrices
  bool vectors = true;  // those of biases and norm
};

constexpr Wanted kWanted[] = {
    {"all", TransformDepth::kContext},
    {"parameters", TransformDepth::kParameters},
    {"last_layer", TransformDepth::kLastLayer},
    {"context", TransformDepth::kContext, false, false},
    {"matrices", TransformDepth::kContext, true, false},
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
    args.grad_out = grad_out.data();
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

template <typename T>
void run(const Wanted& wanted, const TransformCase& on, bool wide, SameBits& bits, const host::Schedule& schedule) {
  using A = Acc<T>;
  const TransformPlan plan =
      make_transform_backward_plan(problem_of(on, Element<T>::type), device_of(on, schedule), wanted.depth);
  const int stride = on.channels;
  Buffer<A> context("context", static_cast<std::size_t>(on.images) * stride, Use::kInput);
  Numbers numbers(11);
  for (std::size_t i = 0; i < context.size(); ++i) context[i] = static_cast<A>(numbers(1) + 0.25);
  Buffer<A> grad_context("grad_context", static_cast<std::size_t>(on.images) * on.channels, Use::kOutput);
  std::vector<std::unique_ptr<Branch<T>>> branches;
  PhaseCounters counters(plan);
  TransformBackwardArgs args{};
  args.counters = counters.data();
  args.images = on.images;
  args.channels = on.channels;
  args.branches = on.branches();
  args.context = context.data();
  args.context_stride = stride;
  args.factor = kFactor;
  args.activation = on.activation;
  const bool with_context = wanted.depth == TransformDepth::kContext;
  if (with_context) args.grad_context = grad_context.data();
  Buffer<A> zero("zero", 1, Use::kOutput);
  args.zero = {zero.data(), true};
  std::int64_t workspace = 0;
  for (int b = 0; b < on.branches(); ++b) {
    const TransformWorkspace own = backward_workspace(problem_of(on, Element<T>::type), plan, b);
    workspace += own.total();
    branches.push_back(std::make_unique<Branch<T>>(wanted, on, on.hidden[b], wide, gate_of(on, b, wide), own));
    args.branch[b] = branches[b]->args();
  }
  host::require(plan.workspace == workspace, "workspace of " + plan.to_string());
  run_launch(plan, schedule, [&] { return launch_transform_backward(plan, args, nullptr); });

  counters.check();
  host::require_close("zero", zero[0], 0, 0);
  std::vector<Bounded> want(grad_context.size());
  for (const auto& branch : branches) {
    const bool deep = wanted.depth != TransformDepth::kLastLayer;
    const bool early = plan.paths.has(Path::kEarlyStart);
    const auto passes = [&](const SmallVector<T>& matrix, int read, int written) {
      matrix.with_buffer([&](const auto& buffer) {
        require_passes(buffer, read, written);
        require_prefetched(buffer, early ? read : 0);  // nothing that is not needed
      });
    };
    passes(branch->w1, with_context ? 1 : 0, 0);
    passes(branch->w2, deep ? 1 : 0, 0);
    passes(branch->grad_w1, 0, wanted.weights && deep ? 1 : 0);
    passes(branch->grad_w2, 0, wanted.weights ? 1 : 0);
    branch->check(context, stride, want);
    if (wanted.weights) bits.check(branch->grad_w2);
    if (wanted.weights && deep) bits.check(branch->grad_w1);
  }
  if (!with_context) return;
  bits.check(grad_context);
  for (std::size_t i = 0; i < want.size(); ++i) {
    host::require_close("grad_context", grad_context[i], want[i].value, want[i].error);
  }
}

// Sums over very many images, of terms of either sign or of one.
struct AccuracyCase {
  const char* name;
  int images, channels, hidden;
  TransformDepth depth;
  bool one_sign;
  // Eager's errors, of eager_errors.py. Of what the depth leaves out: 0.
  double w2, b2, w1, b1, norm_weight, norm_bias;
};

constexpr AccuracyCase kAccuracyCases[] = {
    {"many_images", 8192, 64, 64, TransformDepth::kParameters, false, 5.3, 1.3, 5.1, 3.6, 91.4, 33.0},
    {"very_many_images", 65536, 32, 32, TransformDepth::kLastLayer, false, 7.0, 1.8, 0, 0, 0, 0},
    {"very_many_images_one_sign", 65536, 32, 32, TransformDepth::kLastLayer, true, 9.6, 1.9, 0, 0, 0, 0},
};

void run_accuracy(const AccuracyCase& on, const host::Schedule& schedule) {
  const int images = on.images, channels = on.channels, hidden = on.hidden;
  const auto index = [](int row, int width, int column) { return static_cast<std::size_t>(row) * width + column; };
  const TransformCase shape = {images, channels, {hidden}, 1, false, false, on.name, true, Activation::kSiLU};
  const TransformPlan plan =
      make_transform_backward_plan(problem_of(shape, ElementType::kFloat), device_of(shape), on.depth);
  const Wanted wanted = {on.name, on.depth};
  Branch<float> branch(wanted, shape, hidden, true, Gate::kNone,
                       backward_workspace(problem_of(shape, ElementType::kFloat), plan, 0));
  const auto pattern = [](unsigned seed) { return Pattern(seed, 20); };
  Buffer<float> context("context", index(images, channels, 0), Use::kInput);
  for (std::size_t i = 0; i < context.size(); ++i) context[i] = static_cast<float>(pattern(1)(i));
  for (std::size_t i = 0; i < branch.matrix; ++i) {
    branch.w1.set(i, pattern(2)(i) / 4);
    branch.w2.set(i, pattern(6)(i));
  }
  for (int p = 0; p < hidden; ++p) {
    branch.norm_weight.set(p, 1 + pattern(4)(p) / 2);
    branch.norm_bias.set(p, pattern(5)(p));
  }
  for (std::size_t i = 0; i < branch.outputs; ++i) {
    const double value = pattern(7)(i);
    branch.grad_out[i] = static_cast<float>(on.one_sign ? (value + 1) / 2 : value);
  }

  std::vector<double> grad_w1(branch.matrix), grad_b1(hidden), grad_norm_weight(hidden), grad_norm_bias(hidden),
      grad_w2(branch.matrix), grad_b2(channels), normalized(hidden), y(hidden), dy(hidden);
  for (int n = 0; n < images; ++n) {
    double mean = 0, variance = 0, dn_mean = 0, product_mean = 0;
    for (int p = 0; p < hidden; ++p) {
      normalized[p] = 2 + pattern(3)(p);  // b1
      for (int c = 0; c < channels; ++c) {
        normalized[p] += branch.w1[index(p, channels, c)] * context[index(n, channels, c)];
      }
      mean += normalized[p] / hidden;
    }
    for (const double h : normalized) variance += (h - mean) * (h - mean) / hidden;
    const double inverse = 1 / std::sqrt(variance + 1e-5);
    branch.inverse_deviation[n] = static_cast<float>(inverse);
    for (int p = 0; p < hidden; ++p) {
      normalized[p] = (normalized[p] - mean) * inverse;
      branch.normalized[index(n, hidden, p)] = static_cast<float>(normalized[p]);
      const double v = branch.before(p, normalized[p]);
      y[p] = activate_of(shape.activation, v);
      dy[p] = 0;
      for (int c = 0; c < channels; ++c) {
        dy[p] += branch.w2[index(c, hidden, p)] * branch.grad_out[index(n, channels, c)];
      }
      dy[p] *= slope_of(shape.activation, v);
      dn_mean += branch.norm_weight[p] * dy[p] / hidden;
      product_mean += branch.norm_weight[p] * dy[p] * normalized[p] / hidden;
    }
    for (int p = 0; p < hidden; ++p) {
      const double dh = inverse * (branch.norm_weight[p] * dy[p] - dn_mean - normalized[p] * product_mean);
      grad_b1[p] += dh;
      grad_norm_weight[p] += dy[p] * normalized[p];
      grad_norm_bias[p] += dy[p];
      for (int c = 0; c < channels; ++c) {
        grad_w1[index(p, channels, c)] += dh * context[index(n, channels, c)];
        grad_w2[index(c, hidden, p)] += branch.grad_out[index(n, channels, c)] * y[p];
      }
    }
    for (int c = 0; c < channels; ++c) grad_b2[c] += branch.grad_out[index(n, channels, c)];
  }

  PhaseCounters counters(plan);
  TransformBackwardArgs args{};
  args.counters = counters.data();
  args.images = images;
  args.channels = channels;
  args.branches = 1;
  args.context = context.data();
  args.context_stride = channels;
  args.factor = 1;
  args.activation = shape.activation;
  args.branch[0] = branch.args();
  run_launch(plan, schedule, [&] { return launch_transform_backward(plan, args, nullptr); });

  const auto check = [&](const std::string& what, const SmallVector<float>& got, const std::vector<double>& want,
                         double eager) {
    LargestError error;
    for (std::size_t i = 0; i < want.size(); ++i) error.add(got[i], want[i]);
    error.require(what, eager);
  };
  check("grad_w2", branch.grad_w2, grad_w2, on.w2);
  check("grad_b2", branch.grad_b2, grad_b2, on.b2);
  if (on.depth == TransformDepth::kLastLayer) return;
  check("grad_w1", branch.grad_w1, grad_w1, on.w1);
  check("grad_b1", branch.grad_b1, grad_b1, on.b1);
  check("grad_norm_weight", branch.grad_norm_weight, grad_norm_weight, on.norm_weight);
  check("grad_norm_bias", branch.grad_norm_bias, grad_norm_bias, on.norm_bias);
}

// An infinite gradient of one unit: what the norm makes of it is NaN for every unit of that image, and of no other.
template <typename T>
void run_infinite(const host::Schedule& schedule) {
  const TransformCase on = {3, 4, {5}, 1, false, false, ""};
  const Wanted wanted = {"", TransformDepth::kContext};
  const TransformPlan plan =
      make_transform_backward_plan(problem_of(on, Element<T>::type), device_of(on), wanted.depth);
  Branch<T> branch(wanted, on, on.hidden[0], true, Gate::kNone,
                   backward_workspace(problem_of(on, Element<T>::type), plan, 0));
  for (int p = 0; p < branch.hidden; ++p) branch.norm_bias.set(p, p == 2 ? 100 : -100);  // the others' ReLU is shut
  branch.grad_out[branch.channels + 1] = std::numeric_limits<Acc<T>>::infinity();
  Buffer<Acc<T>> context("context", branch.outputs, Use::kInput);
  for (std::size_t i = 0; i < context.size(); ++i) context[i] = static_cast<Acc<T>>(Pattern(1, 8)(i));
  Buffer<Acc<T>> grad_context("grad_context", branch.outputs, Use::kOutput);
  PhaseCounters counters(plan);
  TransformBackwardArgs args{};
  args.counters = counters.data();
  args.images = on.images;
  args.channels = on.channels;
  args.branches = 1;
  args.context = context.data();
  args.context_stride = on.channels;
  args.factor = 1;
  args.grad_context = grad_context.data();
  args.branch[0] = branch.args();
  run_launch(plan, schedule, [&] { return launch_transform_backward(plan, args, nullptr); });
  const auto check = [&](const Buffer<Acc<T>>& got, int width) {
    for (std::size_t i = 0; i < got.size(); ++i) {
      const bool spoilt = i / width == 1;
      host::require(spoilt ? std::isnan(got[i]) : std::isfinite(got[i]),
                    got.name() + "[" + std::to_string(i) + "] is " + std::to_string(got[i]));
    }
  };
  check(branch.grad_hidden, branch.hidden);
  check(grad_context, branch.channels);
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  each_type(true, [&](auto element) {
    using T = decltype(element);
    list.push_back({std::string("infinite-") + Element<T>::name, "an infinity in a norm's sums is NaN, as in PyTorch",
                    [](const host::Schedule& schedule) { run_infinite<T>(schedule); }});
  });
  bool wide_first = false;
  for (const Wanted& wanted : kWanted) {
    wide_first = !wide_first;
    for (host::Case& one :
         cases_of(wanted.name, wide_first,
                  [=](auto element, const TransformCase& on, bool wide, SameBits& bits,
                      const host::Schedule& schedule) { run<decltype(element)>(wanted, on, wide, bits, schedule); })) {
      list.push_back(std::move(one));
    }
  }
  for (const AccuracyCase& on : kAccuracyCases) {
    list.push_back(accuracy_case(on.name, "rounding errors do not grow with the number of images",
                                 [=](const host::Schedule& schedule) { run_accuracy(on, schedule); }));
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
