// pool_forward and pixel_dot of a normalized map (csrc/cuda/kernels/normalized_pool.h) against plain loops.
#include "cuda/kernels/normalized_pool.h"

#include "norm_cases.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

template <typename T>
struct Pooling {
  using A = Acc<T>;

  bool mask;
  ShapeCase on;
  Layout layout;
  Norm<T> norm;
  int images = on.shape.images, channels = on.shape.channels, pixels = on.shape.pixels;
  std::size_t all_pixels = static_cast<std::size_t>(images) * pixels;
  std::size_t states = static_cast<std::size_t>(images) * (channels + 2);

  FeatureMap<T> y{"y", on.shape, layout, Use::kInput, on.misaligned};
  SmallVector<T> mask_weight{"mask_weight", static_cast<std::size_t>(channels), norm.wide, Use::kInput};
  SmallVector<T> mask_bias{"mask_bias", 1, norm.wide, Use::kInput};
  double factor = 1.0 / pixels;
  Buffer<A> logits{"logits", all_pixels, Use::kOutput};
  Buffer<A> state{"state", states, Use::kOutput}, of_x{"of_x", states, Use::kOutput};

  Pooling(bool mask_, const ShapeCase& on_, Layout layout_, NormSource source, bool wide)
      : mask(mask_), on(on_), layout(layout_), norm(source, on_.shape.channels, wide) {
    Numbers numbers(33);
    norm.fill(y, on.shape);
    mask_weight.fill(numbers, 2 / std::sqrt(channels));
    mask_bias.set(0, 0.75);
  }

  void run(const host::Schedule& schedule) {
    const auto plan_of = [&](KernelKind kind, bool dots_given) {
      return plan_for<T>(kind, on.shape, layout, on.multiprocessors, dots_given, on.misaligned);
    };
    Plan plan = plan_of(mask ? KernelKind::kPoolMaskNormalized : KernelKind::kPoolUniformNormalized, false);
    NormalizedPoolArgs args{};
    args.x = y.buffer().data();
    args.norm = norm.args();
    args.factor = factor;
    if (mask && plan.holds_channels) {
      args.mask_weight = mask_weight.companion();
      args.mask_bias = mask_bias.companion();
      args.logits = logits.data();
    } else if (mask) {
      run_pixel_dot(plan_of(KernelKind::kPixelDotNormalized, false), schedule);
      plan = plan_of(KernelKind::kPoolLogitsNormalized, true);
      args.given_logits = {logits.data(), true};
    }
    const bool two_passes = mask && args.logits == nullptr;
    const int splits = plan.walk.splits, rows = merged_rows(splits, plan.walk.group);
    const std::size_t sums = splits > 1 ? static_cast<std::size_t>(images) * channels * rows : 0;
    Buffer<A> partial_context("partial_context", sums, Use::kOutput);
    Buffer<A> partial_stats("partial_stats", splits > 1 && mask ? images * plan.chunks * rows * 2 : 0, Use::kOutput);
    host::require(static_cast<std::size_t>(plan.workspace) == partial_context.size() + partial_stats.size(),
                  "workspace of " + plan.to_string());
    Tickets tickets(plan);
    args.state = state.data();
    args.state_of_x = of_x.data();
    args.partial_context = partial_context.data();
    args.partial_stats = partial_stats.data();
    args.tickets = tickets.data();
    run_launch(plan, schedule, [&] { return launch_normalized_pool(plan, args, nullptr); });
    tickets.check();
    require_passes(y.buffer(), two_passes ? 2 : 1, 0);
    if (mask && !two_passes) require_passes(logits, 0, 1);
  }

  void run_pixel_dot(const Plan& plan, const host::Schedule& schedule) {
    NormalizedPixelDotArgs args{};
    args.x = y.buffer().data();
    args.norm = norm.args();
    args.vector = mask_weight.companion();
    args.bias = mask_bias.companion();
    args.dots = logits.data();
    run_launch(plan, schedule, [&] { return launch_normalized_pixel_dot(plan, args, nullptr); });
  }

  // Nobody writes them, and nobody reads them.
  void forget_statistics_of_x() {
    for (int n = 0; n < images; ++n) {
      for (const int i : {0, 1}) of_x[static_cast<std::size_t>(n) * (channels + 2) + i] = 0;
    }
  }

  void check() const {
    const double roundoff = Element<A>::roundoff;
    for (int n = 0; n < images; ++n) {
      std::vector<double> attention(pixels, factor);
      const std::size_t n0 = static_cast<std::size_t>(n) * (channels + 2);
      double attention_error = 0;  // relative
      if (mask) {
        attention_error = expect_attention(n, attention);
      } else {
        host::require(state[n0] == 0 && state[n0 + 1] == static_cast<A>(pixels), "the state of a mean is (0, S, ...)");
      }
      for (int c = 0; c < channels; ++c) {
        double sum = 0, size = 0;
        for (int s = 0; s < pixels; ++s) {
          sum += attention[s] * (y(n, c, s) - norm.mean(c));
          size += std::abs(attention[s] * (y(n, c, s) - norm.mean(c)));  // beside the deviation, not beside y
        }
        const double error = (attention_error + sum_error<T>(pixels)) * size;
        host::require_close("state", state[n0 + 2 + c], sum, error);
        const double of_norm = std::abs(norm.slope(c) * sum) + std::abs(norm.bias(c));
        host::require_close("context of x", of_x[n0 + 2 + c], norm.slope(c) * sum + norm.bias(c),
                            std::abs(norm.slope(c)) * error + 6 * roundoff * of_norm);
      }
    }
  }

 private:
  // Checks the logits, the maximum and the sum of the softmax. Sets the attention and returns its relative error.
  double expect_attention(int n, std::vector<double>& attention) const {
    double logit_error = 0, most = -HUGE_VAL, least = HUGE_VAL, z = 0;
    std::vector<double> logit(pixels);
    for (int s = 0; s < pixels; ++s) {
      double size = std::abs(mask_bias[0]);
      logit[s] = mask_bias[0];
      for (int c = 0; c < channels; ++c) {
        const double product = mask_weight[c] * norm.slope(c) * (y(n, c, s) - norm.mean(c));
        logit[s] += product + mask_weight[c] * norm.bias(c);
        size += std::abs(product) + std::abs(mask_weight[c] * norm.bias(c));
      }
      const double error = sum_error<T>(2 * channels + 1) * size;
      host::require_close("logit", logits[static_cast<std::size_t>(n) * pixels + s], logit[s], error);
      logit_error = std::max(logit_error, error);
      most = std::max(most, logit[s]);
      least = std::min(least, logit[s]);
    }
    for (int s = 0; s < pixels; ++s) z += attention[s] = std::exp(logit[s] - most);
    for (double& a : attention) a /= z;
    const double error = 2 * logit_error + Element<A>::roundoff * (4 + 2 * std::min(most - least, 100.0));
    const std::size_t n0 = static_cast<std::size_t>(n) * (channels + 2);
    host::require_close("m", state[n0], most, logit_error);
    host::require_close("z", state[n0 + 1], z, (error + sum_error<T>(pixels)) * z);
    return error + sum_error<T>(pixels);
  }
};

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // parameters in the element's type and in the accumulation type take turns
  int source = 0;
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        for (const bool mask : {true, true, false}) {
          wide = !wide;
          const NormSource from = kNormSources[++source % 3];
          const std::string name = std::string(mask ? "mask-" : "uniform-") + Element<T>::name + "-" +
                                   gc::name_of(layout) + "-" + on.shape.to_string() +
                                   (on.misaligned ? "+" + std::to_string(on.misaligned) : "") + "-" + name_of(from);
          auto bits = std::make_shared<SameBits>();
          list.push_back({name, on.reason, [=, wide = wide](const host::Schedule& schedule) {
                            Pooling<T> pooling(mask, on, layout, from, wide);
                            pooling.run(schedule);
                            pooling.check();
                            pooling.forget_statistics_of_x();
                            bits->check(pooling.state);
                            bits->check(pooling.of_x);
                          }});
        }
      });
    }
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
