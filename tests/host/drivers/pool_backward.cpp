// pool_backward (csrc/cuda/kernels/pool_backward.h), after pixel_dot where a block cannot hold all channels, against
// plain loops over the formula. What the forward pass leaves behind (logits and state) is made here, rounded as it
// would be.
#include "accuracy.h"
#include "feature_map.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

// Which gradients are wanted, and what a block has beside its attention.
struct Variant {
  const char* name;
  PoolGradient gradient;
  bool scaled = false;  // kBlock: with channel_mul
  bool grad_x = true;
  bool grad_weight = true;
  Paths paths = {};         // that the plan takes
  bool normalized = false;  // x is that of y, by normalized_pool_backward

  bool mask() const { return gradient != PoolGradient::kLogits; }
  bool block() const { return gradient == PoolGradient::kBlock; }
};

constexpr Variant kNormalized = {"normalized", PoolGradient::kMask, false, false, true, {}, true};
constexpr Variant kVariants[] = {
    {"mask", PoolGradient::kMask},
    {"logits", PoolGradient::kLogits},
    {"block_add", PoolGradient::kBlock},
    {"block_mul", PoolGradient::kBlock, true},
    {"block_mul_x", PoolGradient::kBlock, true, true, false},
    {"block_add_weight", PoolGradient::kBlock, false, false, true},
    {"block_add_staged", PoolGradient::kBlock, false, true, true, Path::kStagedGrad},
    {"block_mul_staged", PoolGradient::kBlock, true, true, true, Path::kStagedGrad},
    {"block_add_weight_staged", PoolGradient::kBlock, false, false, true, Path::kStagedGrad},
    kNormalized,
    {"normalized_logits", PoolGradient::kMask, false, false, false, {}, true},  // without a gradient of the mask
};

template <typename T>
struct Backward {
  using A = Acc<T>;

  Variant variant;
  bool mask = variant.mask();
  ShapeCase on;
  Layout layout;
  bool wide;  // the small vectors

  FeatureMap<T> x{"x", on.shape, layout, Use::kInput, on.misaligned};
  FeatureMap<T> grad{"grad", on.shape, layout, Use::kInput, on.misaligned};
  SmallVector<T> scale{"scale", channels_in_all(), wide, Use::kInput};
  SmallVector<T> grad_context{"grad_context", channels_in_all(), wide, Use::kInput};
  SmallVector<T> mask_weight{"mask_weight", static_cast<std::size_t>(on.shape.channels), wide, Use::kInput};
  SmallVector<T> logits{"logits", pixels_in_all(), mask || wide, Use::kInput};
  SmallVector<T> mean{"mean", static_cast<std::size_t>(on.shape.channels), true, Use::kInput};  // and so on: normalized
  SmallVector<T> inverse_std{"inverse_std", static_cast<std::size_t>(on.shape.channels), true, Use::kInput};
  SmallVector<T> norm_weight{"norm_weight", static_cast<std::size_t>(on.shape.channels), !wide, Use::kInput};
  Buffer<A> state{"state", channels_in_all() + 2 * on.shape.images, Use::kInput};

  FeatureMap<T> grad_x{"grad_x", on.shape, layout, Use::kOutput, on.misaligned};
  SmallVector<T> grad_logits{"grad_logits", pixels_in_all(), wide, Use::kOutput};
  SmallVector<T> grad_weight{"grad_weight", static_cast<std::size_t>(on.shape.channels), !wide, Use::kOutput};
  Buffer<A> attention{"attention", pixels_in_all(), Use::kOutput};

  Backward(const Variant& variant_, const ShapeCase& on_, Layout layout_, bool wide_)
      : variant(variant_), on(on_), layout(layout_), wide(wide_) {
    Numbers numbers(5);
    x.fill(numbers, 2);
    grad.fill(numbers, 1);
    scale.fill(numbers, 1);
    grad_context.fill(numbers, 1);
    mask_weight.fill(numbers, 1);
    logits.fill(numbers, 2);
    mean.fill(numbers, 1);
    norm_weight.fill(numbers, 2);
    for (int c = 0; c < on.shape.channels; ++c) inverse_std.set(c, 1 + numbers(0.5));
    // Padding: pixels without weight, whose gradient is 0.
    for (int s = 0; s < on.shape.pixels / 8; ++s) logits.set(s, -std::numeric_limits<double>::infinity());
    for (int n = 0; n < on.shape.images; ++n) set_state(n);
  }

  std::size_t pixels_in_all() const { return static_cast<std::size_t>(on.shape.images) * on.shape.pixels; }
  std::size_t channels_in_all() const { return static_cast<std::size_t>(on.shape.images) * on.shape.channels; }
  std::size_t state0(int n) const { return static_cast<std::size_t>(n) * (on.shape.channels + 2); }

  // What is pooled, and the gradient of its context.
  double centred(int n, int c, int s) const { return x(n, c, s) - (variant.normalized ? mean[c] : 0); }
  double vector(int n, int c) const {
    const double grad = grad_context[static_cast<std::size_t>(n) * on.shape.channels + c];
    return variant.normalized ? grad * norm_weight[c] * inverse_std[c] : grad;
  }

  void set_state(int n) {
    const auto [images, channels, pixels] = on.shape;
    const std::size_t n0 = static_cast<std::size_t>(n) * pixels;
    double m = -std::numeric_limits<double>::infinity(), z = 0;
    for (int s = 0; s < pixels; ++s) m = std::max(m, logits[n0 + s]);
    for (int s = 0; s < pixels; ++s) z += std::exp(logits[n0 + s] - m);
    state[state0(n)] = static_cast<A>(m);
    state[state0(n) + 1] = static_cast<A>(z);
    for (int c = 0; c < channels; ++c) {
      double sum = 0;
      for (int s = 0; s < pixels; ++s) sum += std::exp(logits[n0 + s] - m) / z * centred(n, c, s);
      state[state0(n) + 2 + c] = static_cast<A>(sum);
    }
  }

  void run(const host::Schedule& schedule, SameBits& bits) {
    const KernelKind kind = variant.normalized ? KernelKind::kPoolBackwardNormalized
                            : variant.block()  ? KernelKind::kPoolBackwardBlock
                            : mask             ? KernelKind::kPoolBackwardMask
                                               : KernelKind::kPoolBackwardLogits;
    const auto plan_of = [&](KernelKind wanted, bool dots_given) {
      return plan_for<T>(wanted, on.shape, layout, on.multiprocessors, dots_given, on.misaligned,
                         variant.paths | paths_under(schedule));
    };
    Plan plan = plan_of(kind, false);
    const bool two_passes = !plan.holds_channels;
    Buffer<A> dots("dots", two_passes ? pixels_in_all() : 0, Use::kOutput);
    NormalizedPoolBackwardArgs args{};
    if (two_passes) {
      const KernelKind dot = variant.normalized ? KernelKind::kPixelDotNormalized : KernelKind::kPixelDot;
      run_pixel_dot(plan_of(dot, false), dots, schedule);
      plan = plan_of(kind, true);
      args.dots = dots.data();
    }
    // Of more channels, the vectors over them leave no room; and single halves are not copied.
    const bool too_many = on.shape.channels > 4096, too_narrow = plan.width * sizeof(T) < kLeastStaged;
    host::require(plan.paths.without(Path::kEarlyStart) == variant.paths || too_many || too_narrow,
                  "the path is taken: " + plan.to_string());
    const int rows = merged_rows(plan.walk.images * plan.walk.splits, plan.walk.group);
    Buffer<A> partial_weight("partial_weight", mask ? static_cast<std::size_t>(rows) * on.shape.channels : 0,
                             Use::kOutput);
    host::require(static_cast<std::size_t>(plan.workspace) == partial_weight.size(),
                  "workspace of " + plan.to_string());
    Tickets tickets(plan);
    args.x = x.buffer().data();
    args.grad_context = grad_context.companion();
    args.logits = logits.companion();
    args.state = state.data();
    if (variant.block()) args.grad = grad.buffer().data();
    if (variant.scaled) args.scale = scale.companion();
    if (variant.grad_x) args.grad_x = grad_x.buffer().data();
    if (mask) {
      args.mask_weight = mask_weight.companion();
      if (variant.grad_weight) args.grad_weight = grad_weight.out();
      args.partial_weight = partial_weight.data();
      args.tickets = tickets.data();
    } else {
      args.grad_logits = grad_logits.out();
    }
    if (variant.normalized) {
      args.norm = norm();
      args.grad_logits = grad_logits.out();
      args.attention = attention.data();
    }
    run_launch(plan, schedule, [&] {
      return variant.normalized ? launch_normalized_pool_backward(plan, args, nullptr)
                                : launch_pool_backward(plan, args, nullptr);
    });
    tickets.check();
    require_passes(x.buffer(), two_passes ? 2 : 1, 0);
    require_passes(grad.buffer(), variant.block() && variant.grad_x ? 1 : 0, 0);
    require_passes(grad_x.buffer(), 0, variant.grad_x ? 1 : 0);
    if (variant.grad_x) bits.check(grad_x.buffer());
    if (variant.normalized) bits.check(grad_logits);
    if (mask && variant.grad_weight) bits.check(partial_weight);
  }

  NormArgs norm() {
    NormArgs norm{};
    norm.mean = mean.companion();
    norm.inverse_std = inverse_std.companion();
    norm.weight = norm_weight.companion();
    return norm;
  }

  void run_pixel_dot(const Plan& plan, Buffer<A>& dots, const host::Schedule& schedule) {
    NormalizedPixelDotArgs args{};
    args.norm = norm();
    args.x = x.buffer().data();
    args.vector = grad_context.companion();
    args.image_stride = on.shape.channels;
    args.offset = state.data() + 2;
    args.offset_stride = on.shape.channels + 2;
    args.dots = dots.data();
    run_launch(plan, schedule, [&] {
      return variant.normalized ? launch_normalized_pixel_dot(plan, args, nullptr)
                                : launch_pixel_dot(plan, args, nullptr);
    });
  }

  void check() const {
    const auto [images, channels, pixels] = on.shape;
    const double roundoff = Element<A>::roundoff;
    std::vector<double> weight_sum(channels, 0), weight_error(channels, 0);
    for (int n = 0; n < images; ++n) {
      const std::size_t c0 = static_cast<std::size_t>(n) * channels;
      double context_dot = 0, context_size = 0;
      for (int c = 0; c < channels; ++c) {
        context_dot += vector(n, c) * state[state0(n) + 2 + c];
        context_size += std::abs(vector(n, c) * state[state0(n) + 2 + c]);
      }
      for (int s = 0; s < pixels; ++s) {
        const std::size_t ns = static_cast<std::size_t>(n) * pixels + s;
        double dot = 0, size = context_size;
        for (int c = 0; c < channels; ++c) {
          dot += vector(n, c) * centred(n, c, s);
          size += std::abs(vector(n, c) * centred(n, c, s));
        }
        const double below = logits[ns] - state[state0(n)];
        const double attention = std::exp(below) / state[state0(n) + 1];
        const double attention_error = attention == 0 ? 0 : attention * roundoff * (6 - 2 * below);
        const double grad_logit = attention * (dot - context_dot);
        const double logit_error = attention * sum_error<T>(channels) * size + attention_error * size;
        if (variant.normalized) host::require_close("attention", this->attention[ns], attention, attention_error);
        if (!mask || variant.normalized) {
          host::require_close("grad_logits", grad_logits[ns], grad_logit,
                              grad_logits.store_error(grad_logit) + logit_error);
        }
        for (int c = 0; c < channels; ++c) {
          const double w = mask ? mask_weight[c] : 0;
          const double direct = attention * grad_context[c0 + c], through = grad_logit * w;
          const double past = variant.block() ? grad(n, c, s) * (variant.scaled ? scale[c0 + c] : 1) : 0;
          const double error = std::abs(grad_context[c0 + c]) * attention_error + std::abs(w) * logit_error +
                               4 * roundoff * (std::abs(direct) + std::abs(through) + std::abs(past));
          const double want = direct + through + past;
          if (variant.grad_x) host::require_close("grad_x", grad_x(n, c, s), want, store_error<T>(want) + error);
          const double part = grad_logit * centred(n, c, s);
          weight_sum[c] += part;
          weight_error[c] += std::abs(centred(n, c, s)) * logit_error + sum_error<T>(images * pixels) * std::abs(part);
        }
      }
    }
    for (int c = 0; mask && variant.grad_weight && c < channels; ++c) {
      host::require_close("grad_weight", grad_weight[c], weight_sum[c],
                          grad_weight.store_error(weight_sum[c]) + weight_error[c]);
    }
  }
};

// Attention over pixels whose logits are exact in float32, so that all that differs is the backward pass.
struct AccuracyCase {
  const char* name;
  Shape shape;
  double mean;     // of x, which is uniform within 4 of it
  double weights;  // the largest weight of the mask: how far the logits are spread
  // Eager's errors, of eager_errors.py: of the gradients of given logits and with them of x; with a mask of x, of x in
  // a block, and of the mask's weight. Where one pixel has all the weight, those of logits and weight are 0 but for
  // exp(-100) or so, and all that eager has there is noise.
  double logits, x_logits, x_mask, x_block, weight;
  const char* reason;
  bool alike = false;  // all images
};

constexpr AccuracyCase kAccuracyCases[] = {
    {"peaked", {2, 64, 400}, 10, 16, 16777216, 0, 0.5, 0.3, 40735241.9, "one pixel has all the weight: no noise"},
    {"peaked_chunks", {2, 8200, 16}, 10, 1, 16777216, 0, 0, 0, 29686722.3, "the same with the dot products given"},
    {"spread", {2, 64, 400}, 10, 0.5, 11.8, 1.7, 10.9, 7.5, 16.8, "some pixels share the weight"},
    {"spread_chunks", {1, 8200, 16}, 8, 0.03125, 20.1, 1.8, 13.4, 7.7, 27.9, "the same with the dot products given"},
    {"far_from_zero", {1, 32, 2100}, 100, 0.125, 148.2, 1.4, 97.7, 1.5, 1068.3, "the mean of x is not in the weight"},
    // Eager has 309.3 in the weight; a chain of additions as long as a group had 19.7.
    {"alike", {4096, 16, 4}, 10, 0.5, 14.9, 0.8, 11.1, 4.9, 1, "additions of equal parts all err to one side", true},
};

void run_accuracy(const AccuracyCase& on, const Variant& variant, Layout layout, const host::Schedule& schedule) {
  Backward<float> backward(variant, {on.shape, 4, false, 0, on.reason}, layout, true);
  const auto [images, channels, pixels] = on.shape;
  const Pattern x(1, 10), weight(2, 6), grad_context(3, 20), grad(4, 20);
  const auto at = [&](int n, int c, int s) {
    return 4 * x((static_cast<std::size_t>(on.alike ? 0 : n) * channels + c) * pixels + s) + on.mean;
  };
  const auto vector = [&](int n, int c) {
    return grad_context(static_cast<std::size_t>(on.alike ? 0 : n) * channels + c);
  };
  for (int c = 0; c < channels; ++c) {
    backward.mask_weight.set(c, on.weights * weight(c));
    backward.mean.set(c, on.mean);  // and a slope of 1: the gradients are those without a norm
    backward.inverse_std.set(c, 0.25);
    backward.norm_weight.set(c, 4);
  }
  std::vector<double> contexts, attentions;
  for (int n = 0; n < images; ++n) {
    std::vector<double> logit(pixels, 0);
    for (int c = 0; c < channels; ++c) {
      const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
      backward.grad_context.set(nc, vector(n, c));
      backward.scale.set(nc, 1);
      for (int s = 0; s < pixels; ++s) {
        backward.x.set(n, c, s, at(n, c, s));
        backward.grad.set(n, c, s, grad(nc * pixels + s));
        logit[s] += on.weights * weight(c) * at(n, c, s);
      }
    }
    for (int s = 0; s < pixels; ++s) {
      backward.logits.set(static_cast<std::size_t>(n) * pixels + s, logit[s]);
      host::require(backward.logits[static_cast<std::size_t>(n) * pixels + s] == logit[s], "the logits are exact");
    }
    backward.set_state(n);
    const double most = *std::max_element(logit.begin(), logit.end());
    double z = 0;
    for (const double l : logit) z += std::exp(l - most);
    for (const double l : logit) attentions.push_back(std::exp(l - most) / z);
    for (int c = 0; c < channels; ++c) {
      double sum = 0;
      for (int s = 0; s < pixels; ++s) sum += attentions[static_cast<std::size_t>(n) * pixels + s] * at(n, c, s);
      contexts.push_back(sum);
    }
  }
  SameBits bits;
  backward.run(schedule, bits);

  LargestError logit_error, x_error, weight_error;
  std::vector<double> weight_sum(channels, 0);
  for (int n = 0; n < images; ++n) {
    for (int s = 0; s < pixels; ++s) {
      const std::size_t ns = static_cast<std::size_t>(n) * pixels + s;
      const double* const context = &contexts[static_cast<std::size_t>(n) * channels];
      double grad_logit = 0;
      for (int c = 0; c < channels; ++c) grad_logit += attentions[ns] * vector(n, c) * (at(n, c, s) - context[c]);
      if (!variant.mask() || variant.normalized) logit_error.add(backward.grad_logits[ns], grad_logit);
      for (int c = 0; c < channels; ++c) {
        double want = attentions[ns] * vector(n, c);
        if (variant.mask()) want += grad_logit * on.weights * weight(c);
        if (variant.block()) want += grad((static_cast<std::size_t>(n) * channels + c) * pixels + s);
        if (variant.grad_x) x_error.add(backward.grad_x(n, c, s), want);
        weight_sum[c] += grad_logit * (at(n, c, s) - context[c]);
      }
    }
  }
  for (int c = 0; variant.mask() && c < channels; ++c) weight_error.add(backward.grad_weight[c], weight_sum[c]);
  logit_error.require("grad_logits", on.logits);
  x_error.require("grad_x", variant.block() ? on.x_block : variant.mask() ? on.x_mask : on.x_logits);
  weight_error.require("grad_weight", on.weight);
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // small vectors in the element's type and in the accumulation type take turns
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        wide = !wide;
        for (const Variant& variant : kVariants) {
          wide = !wide;
          const std::string name = std::string(variant.name) + "-" + Element<T>::name + "-" + gc::name_of(layout) +
                                   "-" + on.shape.to_string() +
                                   (on.misaligned ? "+" + std::to_string(on.misaligned) : "");
          auto bits = std::make_shared<SameBits>();
          list.push_back({name, on.reason, [=, wide = wide](const host::Schedule& schedule) {
                            Backward<T> backward(variant, on, layout, wide);
                            backward.run(schedule, *bits);
                            backward.check();
                          }});
        }
      });
    }
  }
  for (const AccuracyCase& on : kAccuracyCases) {
    for (const Layout layout : kLayouts) {
      for (const Variant& variant : {kVariants[0], kVariants[1], kVariants[2], kNormalized}) {
        list.push_back(
            accuracy_case(std::string(on.name) + "-" + variant.name + "-" + gc::name_of(layout), on.reason,
                          [=](const host::Schedule& schedule) { run_accuracy(on, variant, layout, schedule); }));
      }
    }
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
