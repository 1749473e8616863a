// transform_backward (csrc/cuda/kernels/transform_backward.h) against plain loops. What the forward pass leaves behind
// is made up here.
#include "accuracy.h"
#include "backward_branch.h"
#include "cuda/kernels/late_merge.h"
#include "cuda/kernels/transform_slab.h"

namespace gc::drivers {
namespace {

constexpr Wanted kWanted[] = {
    {"all", TransformDepth::kContext},
    {"parameters", TransformDepth::kParameters},
    {"last_layer", TransformDepth::kLastLayer},
    {"context", TransformDepth::kContext, false, false},
    {"matrices", TransformDepth::kContext, true, false},
};

// What normalized_transform_backward takes besides: the norm, and the sums over g that make grad_out. Of one sign, so
// that no sum of two is smaller than its parts.
template <typename T>
struct Normalized {
  using A = Acc<T>;

  std::size_t channels;
  SmallVector<T> inverse_std{"inverse_std", channels, true, Use::kInput};
  SmallVector<T> weight, bias;
  Buffer<A> sums, product_sums;

  Normalized(const TransformCase& on, bool wide)
      : channels(static_cast<std::size_t>(on.channels)),
        weight("norm_weight", channels, wide, Use::kInput),
        bias("norm_bias", channels, !wide, Use::kInput),
        sums("sums", on.images * channels, Use::kInput),
        product_sums("product_sums", on.images * channels, Use::kInput) {
    Numbers numbers(12);
    for (std::size_t c = 0; c < channels; ++c) {
      inverse_std.set(c, 1 + numbers(0.5));
      weight.set(c, 1 + numbers(0.5));
      bias.set(c, 1 + numbers(0.5));
    }
    for (std::size_t i = 0; i < sums.size(); ++i) {
      sums[i] = static_cast<A>(numbers(1));
      product_sums[i] = static_cast<A>(std::copysign(numbers(1), sums[i]));
    }
  }

  double slope(std::size_t c) const { return weight[c] * inverse_std[c]; }

  // Sets what the branch's grad_out then is, for its check.
  void lead_to(Branch<T>& branch, TransformGradients& args) {
    args.grad_out = sums.data();
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const std::size_t c = i % channels;
      const bool mul = branch.gate != Gate::kNone;
      branch.grad_out[i] = mul ? static_cast<A>(slope(c) * product_sums[i] + bias[c] * sums[i]) : sums[i];
    }
  }

  cudaError_t launch(const TransformPlan& plan, const TransformBackwardArgs& plain) {
    NormalizedTransformBackwardArgs args{};
    static_cast<TransformBackwardArgs&>(args) = plain;
    args.norm.inverse_std = inverse_std.companion();
    args.norm.weight = weight.companion();
    args.norm.bias = bias.companion();
    args.product_sums = product_sums.data();
    return launch_normalized_transform_backward(plan, args, nullptr);
  }
};

template <typename T>
void run(const Wanted& wanted, const TransformCase& on, bool wide, SameBits& bits, const host::Schedule& schedule,
         const Left& left = {}, bool normalized = false) {
  using A = Acc<T>;
  DeviceLimits device = device_of(on, schedule);
  if (left.by_transform) device.paths = device.paths | Path::kLateMerge;
  const TransformPlan plan = make_transform_backward_plan(problem_of(on, Element<T>::type), device, wanted.depth);
  const int stride = on.channels;
  Buffer<A> context("context", static_cast<std::size_t>(on.images) * stride, Use::kInput);
  Numbers numbers(11);
  for (std::size_t i = 0; i < context.size(); ++i) context[i] = static_cast<A>(numbers(1) + (normalized ? 1.25 : 0.25));
  std::optional<Normalized<T>> norm;
  if (normalized) norm.emplace(on, wide);
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
  args.partial.splits = left.by_transform ? left.splits : 0;
  std::int64_t workspace = 0;
  for (int b = 0; b < on.branches(); ++b) {
    const TransformWorkspace own = backward_workspace(problem_of(on, Element<T>::type), plan, b);
    workspace += own.total();
    branches.push_back(std::make_unique<Branch<T>>(wanted, on, on.hidden[b], wide, gate_of(on, b, wide), own));
    branches[b]->leave(left);
    if (left.by_transform) args.partial.sums[b] = branches[b]->partial_out->buffer.data();
    args.branch[b] = branches[b]->args();
    if (norm) norm->lead_to(*branches[b], args.branch[b]);
  }
  host::require(plan.workspace == workspace, "workspace of " + plan.to_string());
  run_launch(plan, schedule,
             [&] { return norm ? norm->launch(plan, args) : launch_transform_backward(plan, args, nullptr); });
  for (std::size_t i = 0; norm && i < context.size(); ++i) {  // what it has read instead, for the check
    context[i] = static_cast<A>(norm->slope(i % stride) * context[i] + norm->bias[i % stride]);
  }

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
    if (left.by_transform) {
      // By the slabs beside each other, and for the bias.
      const int reads = slabs_across(branch->hidden) + (wanted.vectors ? 1 : 0);
      require_passes(branch->partial_out->buffer, reads, 0);
    }
    if (wanted.vectors) bits.check(branch->grad_b2);
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

// The sums of splits, merged by the launch before and by the transform: the same bits.
std::vector<host::Case> late_cases() {
  struct LateCase {
    TransformCase on;
    int splits;
    Wanted wanted;
    const char* reason;
  };
  const LateCase all[] = {
      {{1, 1, {1}, 4, true, false, ""}, 2, kWanted[0], "the smallest: one channel, two splits"},
      {{2, 33, {5}, 4, true, false, ""}, 7, kWanted[0], "a group that is not full"},
      {{3, 64, {16, 8}, 4, true, false, ""}, 8, kWanted[0], "both branches, a full group"},
      {{2, 33, {5, 40}, 1, false, false, ""}, 9, kWanted[0], "two groups; slabs beside each other"},
      {{9, 36, {12}, 4, false, false, ""}, 33, kWanted[0], "a group more than are added to each other first"},
      {{70, 64, {64}, 1, false, false, ""}, 5, kWanted[0], "the highest slabs"},
      {{2, 300, {80}, 3, false, false, ""}, kMostGatheredSplits, kWanted[0], "the most splits"},
      {{2, 64, {8}, 4, false, false, ""}, 12, kWanted[2], "the last layer only"},
      {{2, 64, {8}, 4, false, false, ""}, 15, kWanted[3], "no gradients of parameters"},
  };
  std::vector<host::Case> list;
  for (const LateCase& one : all) {
    for (const bool wide : {false, true}) {  // channel_add and channel_mul
      each_type(one.on.all_types, [&](auto element) {
        using T = decltype(element);
        auto bits = std::make_shared<SameBits>();
        list.push_back({std::string("late-") + Element<T>::name + (wide ? "-wide-" : "-") + one.on.to_string() + "-" +
                            std::to_string(one.splits),
                        one.reason, [=](const host::Schedule& schedule) {
                          for (const bool by_transform : {false, true}) {
                            run<T>(one.wanted, one.on, wide, *bits, schedule, {one.splits, by_transform});
                          }
                        }});
      });
    }
  }
  return list;
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list = late_cases();
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
    const std::string name = std::string("normalized_") + wanted.name;
    for (host::Case& one : cases_of(
             name.c_str(), wide_first,
             [=](auto element, const TransformCase& on, bool wide, SameBits& bits, const host::Schedule& schedule) {
               run<decltype(element)>(wanted, on, wide, bits, schedule, {}, true);
             })) {
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
