// statistics (csrc/cuda/kernels/statistics.h) against plain loops.
#include "accuracy.h"
#include "norm_cases.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

constexpr double kEps = 1e-3;
constexpr double kMomentum = 0.2;

template <typename T>
struct Batch {
  using A = Acc<T>;

  ShapeCase on;
  Layout layout;
  bool wide, with_state;
  double far;  // the means, in deviations
  double eps = kEps;
  int images = on.shape.images, channels = on.shape.channels, pixels = on.shape.pixels;
  std::size_t c_ = static_cast<std::size_t>(channels), states = static_cast<std::size_t>(images) * (channels + 2);

  FeatureMap<T> y{"y", on.shape, layout, Use::kInput, on.misaligned};
  SmallVector<T> weight{"weight", c_, wide, Use::kInput}, bias{"bias", c_, wide, Use::kInput};
  Buffer<A> mean{"mean", c_, Use::kOutput}, inverse_std{"inverse_std", c_, Use::kOutput};
  Buffer<A> variance{"variance", c_, Use::kOutput}, kept_bias{"kept_bias", c_, Use::kOutput};
  SmallVector<T> running_mean{"running_mean", c_, wide, Use::kState};
  SmallVector<T> running_variance{"running_variance", c_, wide, Use::kState};
  Buffer<A> state{"state", states, Use::kOutput}, of_x{"of_x", states, Use::kOutput};
  std::vector<double> mean_before, variance_before;

  Batch(const ShapeCase& on_, Layout layout_, bool wide_, bool with_state_, double far_)
      : on(on_), layout(layout_), wide(wide_), with_state(with_state_), far(far_) {
    Numbers numbers(31);
    for (int n = 0; n < images; ++n) {
      for (int c = 0; c < channels; ++c) {
        // Images differ, and so do the first pixels from the rest.
        for (int s = 0; s < pixels; ++s) {
          y.set(n, c, s, (c % 2 == 0 ? far : -far) + numbers(2) + 0.5 * n + (s < pixels / 4 ? 1 : 0));
        }
      }
    }
    weight.fill(numbers, 1);
    bias.fill(numbers, 1);
    running_mean.fill(numbers, 1);
    running_variance.fill(numbers, 1);
    for (int c = 0; c < channels; ++c) {
      mean_before.push_back(running_mean[c]);
      variance_before.push_back(running_variance[c]);
    }
  }

  bool moves() const { return !with_state || !wide; }

  void run(const host::Schedule& schedule) {
    const Plan plan = plan_for<T>(KernelKind::kStatistics, on.shape, layout, on.multiprocessors, false, on.misaligned);
    const std::size_t rows = rows_by_image(images, plan.walk.splits, plan.walk.group);
    host::require(static_cast<std::size_t>(plan.workspace) == 3 * rows * channels, "workspace of " + plan.to_string());
    Buffer<A> partials("partials", plan.workspace, Use::kOutput);
    Tickets tickets(plan);
    StatisticsArgs args{};
    args.y = y.buffer().data();
    args.eps = eps;
    args.weight = weight.companion();
    args.bias = bias.companion();
    args.kept = {mean.data(), inverse_std.data(), variance.data(), kept_bias.data()};
    if (moves()) {
      args.running_mean = running_mean.out();
      args.running_variance = running_variance.out();
    }
    args.momentum = kMomentum;
    if (with_state) {
      args.state = state.data();
      args.state_of_x = of_x.data();
    }
    args.partials = partials.data();
    args.tickets = tickets.data();
    run_launch(plan, schedule, [&] { return launch_statistics(plan, args, nullptr); });
    tickets.check();
    require_passes(y.buffer(), 1, 0);
    require_passes(mean, 0, 1);
    // The partial results are written once and read once; those of groups twice where states are made of them.
    if (!host::kRaceBuild) return;
    const std::uint64_t row = partials.bytes() / rows, of_splits = row * images * plan.walk.splits;
    const host::Traffic traffic = partials.traffic();
    host::require(traffic.written == partials.bytes(), "partial results are written once");
    const std::uint64_t once = plan.walk.group > 1 ? partials.bytes() : of_splits;
    const std::uint64_t again = with_state ? (once - (plan.walk.group > 1 ? of_splits : 0)) / 3 * 2 : 0;
    host::require(traffic.read == once + again, "partial results are read once, and the means of groups again");
  }

  void check() const {
    const double count = static_cast<double>(images) * pixels, roundoff = Element<A>::roundoff;
    for (int c = 0; c < channels; ++c) {
      std::vector<double> of_image(images, 0);
      double want = 0, squares = 0;
      const double near = y(0, c, 0);  // sums of what is far from 0 would round in float64, too
      for (int n = 0; n < images; ++n) {
        for (int s = 0; s < pixels; ++s) of_image[n] += (y(n, c, s) - near) / pixels;
        want += of_image[n] / images;
      }
      want += near;
      for (int n = 0; n < images; ++n) {
        for (int s = 0; s < pixels; ++s) squares += (y(n, c, s) - want) * (y(n, c, s) - want);
      }
      // Relative to the deviations, and not to y.
      const double sums = sum_error<T>(count), deviation = std::sqrt(squares / count);
      const double mean_error = store_error<A>(want) + 2 * sums * deviation;
      const double unbiased = squares / (count - 1), inverse = 1 / std::sqrt(squares / count + kEps);
      host::require_close("mean", mean[c], want, mean_error);
      host::require_close("variance", variance[c], unbiased, 2 * sums * unbiased);
      host::require_close("inverse_std", inverse_std[c], inverse, 2 * sums * inverse);
      host::require_close("kept bias", kept_bias[c], bias[c], 0);
      if (moves()) {
        const auto moved = [&](double before, double to) { return kMomentum * to + (1 - kMomentum) * before; };
        const double m = moved(mean_before[c], want), v = moved(variance_before[c], unbiased);
        host::require_close("running mean", running_mean[c], m, running_mean.store_error(m) + mean_error);
        host::require_close("running variance", running_variance[c], v,
                            running_variance.store_error(v) + 2 * sums * unbiased);
      }
      for (int n = 0; with_state && n < images; ++n) {
        const std::size_t n0 = static_cast<std::size_t>(n) * (channels + 2);
        const double context = of_image[n] - (mean[c] - near), slope = weight[c] * inverse;
        const double error = 2 * sums * (deviation + std::abs(context));
        host::require(state[n0] == 0 && state[n0 + 1] == static_cast<A>(pixels), "the state of a mean is (0, S, ...)");
        host::require_close("context", state[n0 + 2 + c], context, error);
        host::require_close("context of x", of_x[n0 + 2 + c], slope * context + bias[c],
                            std::abs(slope) * (error + 2 * sums * std::abs(context)) +
                                4 * roundoff * (std::abs(slope * context) + std::abs(bias[c])));
      }
    }
  }
};

// x = (y - mean) inverse_std beside eager's batch_norm of the same y (eager_errors.py).
void run_accuracy(const ShapeCase& on, double mean, double eager, const host::Schedule& schedule) {
  const auto [images, channels, pixels] = on.shape;
  constexpr double kEagerEps = 1e-5;
  for (const Layout layout : kLayouts) {
    Batch<float> batch(on, layout, true, false, 0);
    const Pattern pattern(1, 10);
    std::size_t i = 0;
    for (int n = 0; n < images; ++n) {
      for (int c = 0; c < channels; ++c) {
        for (int s = 0; s < pixels; ++s) batch.y.set(n, c, s, 4 * pattern(i++) + mean);
      }
    }
    batch.eps = kEagerEps;
    batch.run(schedule);
    LargestError error;
    for (int c = 0; c < channels; ++c) {
      double exact = 0, squares = 0;
      const double count = static_cast<double>(images) * pixels;
      const auto each = [&](const auto& take) {
        for (int n = 0; n < images; ++n) {
          for (int s = 0; s < pixels; ++s) take(batch.y(n, c, s));
        }
      };
      each([&](double y) { exact += (y - mean) / count; });
      each([&](double y) { squares += (y - mean - exact) * (y - mean - exact); });
      const double inverse = 1 / std::sqrt(squares / count + kEagerEps);
      each([&](double y) {
        const float x = (static_cast<float>(y) - batch.mean[c]) * batch.inverse_std[c];
        error.add(x, (y - mean - exact) * inverse);
      });
    }
    error.require("x", eager);
  }
}

std::vector<ShapeCase> shapes() {
  std::vector<ShapeCase> list = shape_cases();
  list.push_back({{3, 33, 1500}, 48, true, 0, "several groups of splits in each of several images"});
  list.push_back({{70, 8, 30}, 8, false, 0, "more images than are merged at once, each in one split"});
  return list;
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // parameters in the element's type and in the accumulation type take turns
  const auto add = [&](auto element, const ShapeCase& on, Layout layout, bool with_state, double far) {
    using T = decltype(element);
    wide = !wide;
    auto bits = std::make_shared<SameBits>();
    const std::string name = std::string(Element<T>::name) + "-" + gc::name_of(layout) + "-" + on.shape.to_string() +
                             (on.misaligned ? "+" + std::to_string(on.misaligned) : "") + (with_state ? "-state" : "") +
                             (far > 10 ? "-far" : "");
    list.push_back({name, on.reason, [=, wide = wide](const host::Schedule& schedule) {
                      Batch<T> batch(on, layout, wide, with_state, far);
                      batch.run(schedule);
                      batch.check();
                      for (const auto* one : {&batch.mean, &batch.inverse_std, &batch.variance}) bits->check(*one);
                      if (with_state) bits->check(batch.state);
                    }});
  };
  bool with_state = false;
  for (const ShapeCase& on : shapes()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        with_state = !with_state;
        add(element, on, layout, with_state, 4);
        add(element, on, layout, !with_state, 4);
      });
    }
  }
  // Squares of the values would leave nothing of those of the distances.
  for (const Layout layout : kLayouts) {
    add(float{}, {{2, 40, 300}, 2, true, 0, "a mean of 10^4 deviations"}, layout, true, 16384);
    add(double{}, {{2, 40, 300}, 2, true, 0, "a mean of 10^9 deviations"}, layout, true, 0x1p30);
  }
  struct Accuracy {
    const char* name;
    ShapeCase on;
    double mean, eager;
  };
  const Accuracy accuracies[] = {
      {"near_zero", {{2, 16, 3000}, 8, false, 0, "long sums of either sign"}, 0, 1.4},
      {"far_from_zero", {{2, 16, 3000}, 8, false, 0, "a mean of 40 deviations"}, 100, 33.0},
      {"farther", {{2, 16, 3000}, 8, false, 0, "a mean of 1800 deviations"}, 4096, 1080.8},
      {"many_images", {{300, 8, 49}, 8, false, 0, "a partial result for each of many images"}, 100, 28.4},
  };
  for (const Accuracy& one : accuracies) {
    list.push_back(accuracy_case(one.name, one.on.reason, [=](const host::Schedule& schedule) {
      run_accuracy(one.on, one.mean, one.eager, schedule);
    }));
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
