// pool_forward (csrc/cuda/kernels/pool_forward.h), after pixel_dot where a block cannot hold all channels, against
// plain loops. Where it leaves partial results, so is the state that the transform makes of them.
#include <limits>

#include "cuda/kernels/tile.h"
#include "shapes.h"
#include "transform_cases.h"

namespace gc::drivers {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr KernelKind kKinds[] = {KernelKind::kPoolMask, KernelKind::kPoolLogits, KernelKind::kPoolUniform};

const char* name_of(Weighting weighting) {
  return weighting == Weighting::kMask ? "mask" : weighting == Weighting::kLogits ? "logits" : "uniform";
}

// What is put into x and the logits on top of random numbers. Image 0 always keeps the random ones.
enum class Special { kNone, kAllMinusInfinity, kFirstHalfMinusInfinity, kPlusInfinity, kNaN, kInfiniteX, kFarFromZero };

template <typename T>
struct Pooling {
  using A = Acc<T>;

  Weighting weighting;
  ShapeCase on;
  Layout layout;
  bool wide;  // the small vectors, and the context
  Special special;
  Paths paths;  // that are switched on

  FeatureMap<T> x{"x", on.shape, layout, Use::kInput, on.misaligned};
  SmallVector<T> mask_weight{"mask_weight", static_cast<std::size_t>(on.shape.channels), wide, Use::kInput};
  SmallVector<T> mask_bias{"mask_bias", 1, wide, Use::kInput};
  SmallVector<T> given_logits{"given_logits", pixels_in_all(), wide, Use::kInput};
  double factor = 1.0 / on.shape.pixels;
  // A caller may want only one of them. The transform wants the state.
  bool with_context = paths == Paths{} && !(wide && weighting == Weighting::kMask);
  bool with_state = !with_context || !(wide && weighting == Weighting::kUniform);

  Buffer<A> logits{"logits", pixels_in_all(), Use::kOutput};
  SmallVector<T> context{"context", channels_in_all(), wide, Use::kOutput};
  Buffer<A> state{"state", channels_in_all() + 2 * on.shape.images, Use::kOutput};

  Pooling(Weighting weighting_, const ShapeCase& on_, Layout layout_, bool wide_, Special special_, Paths paths_)
      : weighting(weighting_), on(on_), layout(layout_), wide(wide_), special(special_), paths(paths_) {
    Numbers numbers(3);
    x.fill(numbers, 2);
    mask_weight.fill(numbers, 2 / std::sqrt(on.shape.channels));
    mask_bias.set(0, 0.75);
    given_logits.fill(numbers, 3);
    for (int n = 1; n < on.shape.images; ++n) add_special(n);
  }

  std::size_t pixels_in_all() const { return static_cast<std::size_t>(on.shape.images) * on.shape.pixels; }
  std::size_t channels_in_all() const { return static_cast<std::size_t>(on.shape.images) * on.shape.channels; }

  void add_special(int n) {
    const int pixels = on.shape.pixels;
    for (int s = 0; s < pixels; ++s) {
      const std::size_t ns = static_cast<std::size_t>(n) * pixels + s;
      if (special == Special::kAllMinusInfinity) given_logits.set(ns, -kInfinity);
      if (special == Special::kFirstHalfMinusInfinity && s < pixels / 2) given_logits.set(ns, -kInfinity);
      if (special == Special::kFarFromZero) given_logits.set(ns, 512 * std::floor(given_logits[ns]) + 8000);
      if (s != pixels / 3) continue;
      if (special == Special::kPlusInfinity) given_logits.set(ns, kInfinity);
      if (special == Special::kNaN) given_logits.set(ns, kNaN), x.set(n, 0, s, kNaN);
      // A weight of exactly 0 meets an infinite x: the result is NaN, not skipped.
      if (special == Special::kInfiniteX) given_logits.set(ns, -kInfinity), x.set(n, 1, s, kInfinity);
    }
  }

  void run(const host::Schedule& schedule) {
    const auto plan_of = [&](KernelKind kind, bool dots_given) {
      return plan_for<T>(kind, on.shape, layout, on.multiprocessors, dots_given, on.misaligned, paths);
    };
    Plan plan = plan_of(kKinds[static_cast<int>(weighting)], false);
    PoolForwardArgs args{};
    args.x = x.buffer().data();
    args.factor = factor;
    if (weighting == Weighting::kLogits) args.given_logits = given_logits.companion();
    if (weighting == Weighting::kMask && plan.holds_channels) {
      args.mask_weight = mask_weight.companion();
      args.mask_bias = mask_bias.companion();
      args.logits = logits.data();
    } else if (weighting == Weighting::kMask) {
      run_pixel_dot(plan_of(KernelKind::kPixelDot, false), schedule);
      plan = plan_of(KernelKind::kPoolLogits, true);
      args.given_logits = {logits.data(), true};
    }
    const bool two_passes = weighting == Weighting::kMask && args.logits == nullptr;
    const int splits = plan.walk.splits;
    check_paths(plan, two_passes);
    const int rows = merged_rows(splits, plan.walk.group);
    Buffer<A> partial_context("partial_context", splits > 1 ? channels_in_all() * rows : 0, Use::kOutput);
    const bool softmax = weighting != Weighting::kUniform;
    Buffer<A> partial_stats("partial_stats", splits > 1 && softmax ? on.shape.images * plan.chunks * rows * 2 : 0,
                            Use::kOutput);
    host::require(static_cast<std::size_t>(plan.workspace) == partial_context.size() + partial_stats.size(),
                  "workspace of " + plan.to_string());
    Tickets tickets(plan);
    if (with_context) args.context = context.out();
    if (with_state) args.state = state.data();
    args.partial_context = partial_context.data();
    args.partial_stats = partial_stats.data();
    args.tickets = tickets.data();
    run_launch(plan, schedule, [&] { return launch_pool_forward(plan, args, nullptr); });
    tickets.check();
    if (plan.paths.has(Path::kLateMerge)) {
      host::require(plan.tickets == 0, "nothing is merged in " + plan.to_string());
      merge(plan, args, schedule);
    }
    require_passes(x.buffer(), two_passes ? 2 : 1, 0);
    if (weighting == Weighting::kMask && !two_passes) require_passes(logits, 0, 1);
  }

  // Of the newer paths that are switched on, a plan takes those that it can.
  void check_paths(const Plan& plan, bool two_passes) const {
    Paths taken = paths;
    if (plan.width == kElements<T>) taken = taken.without(Path::kNeighbours);
    if (plan.width * sizeof(T) < kLeastStaged || two_passes) taken = taken.without(Path::kTilesAhead);
    if (plan.walk.splits == 1) taken = taken.without(Path::kLateMerge);
    // Of more channels, the tile leaves no room for another in shared memory.
    const bool too_many = on.shape.channels > 4096 && plan.paths.within(taken);
    host::require(plan.paths == taken || too_many, "a plan that takes its paths: " + plan.to_string());
  }

  // The state, by a transform with one hidden unit.
  void merge(const Plan& pool, const PoolForwardArgs& left, const host::Schedule& schedule) {
    const auto [images, channels, pixels] = on.shape;
    const TransformProblem problem{images, channels, 1, {1, 0}, Element<T>::type, true};
    const TransformPlan plan = make_transform_forward_plan(
        problem, {on.multiprocessors, host::kMaxSharedOptIn, paths_under(schedule) | Path::kLateMerge});
    PhaseCounters counters(plan);
    const std::size_t units = images;
    Buffer<A> weights("weights", std::vector<A>(channels, 1), Use::kInput);
    Buffer<A> products("products", units, Use::kOutput), normalized("normalized", units, Use::kOutput);
    Buffer<A> inverse_deviation("inverse_deviation", units, Use::kOutput);
    Buffer<A> term("term", channels_in_all(), Use::kOutput);
    const Companion all{weights.data(), true};
    TransformForwardArgs args{};
    args.counters = counters.data();
    args.images = images;
    args.channels = channels;
    args.branches = 1;
    args.context = state.data() + 2;
    args.context_stride = channels + 2;
    args.branch[0] = {1,
                      all,
                      all,
                      {},
                      {},
                      all,
                      all,
                      Gate::kNone,
                      products.data(),
                      normalized.data(),
                      inverse_deviation.data(),
                      term.data()};
    const void* const stats = weighting == Weighting::kUniform ? nullptr : left.partial_stats;
    const long long stats_stride = 2LL * pool.chunks * pool.walk.splits;
    args.partial = {pool.walk.splits, pixels, left.partial_context, stats, stats_stride, factor, state.data()};
    run_launch(plan, schedule, [&] { return launch_transform_forward(plan, args, nullptr); });
    counters.check();
  }

  void run_pixel_dot(const Plan& plan, const host::Schedule& schedule) {
    PixelDotArgs args{};
    args.x = x.buffer().data();
    args.vector = mask_weight.companion();
    args.bias = mask_bias.companion();
    args.dots = logits.data();
    run_launch(plan, schedule, [&] { return launch_pixel_dot(plan, args, nullptr); });
  }

  // softmax as PyTorch has it: NaN for a logit of NaN or +inf, and where all are -inf.
  void check() const {
    const auto [images, channels, pixels] = on.shape;
    for (int n = 0; n < images; ++n) {
      std::vector<double> logit(pixels, 0), attention(pixels, weighting == Weighting::kUniform ? factor : 0);
      double logit_error = 0, attention_error = 0;  // the latter relative
      if (weighting != Weighting::kUniform) {
        for (int s = 0; s < pixels; ++s) logit_error = std::max(logit_error, expect_logit(n, s, logit[s]));
        attention_error = expect_attention(n, logit, logit_error, attention);
      } else if (with_state) {
        const std::size_t n0 = static_cast<std::size_t>(n) * (channels + 2);
        host::require(state[n0] == 0 && state[n0 + 1] == static_cast<A>(pixels), "the state of a mean is (0, S, ...)");
      }
      for (int c = 0; c < channels; ++c) {
        double sum = 0, size = 0;
        for (int s = 0; s < pixels; ++s) {
          sum += attention[s] * x(n, c, s);
          size += std::abs(attention[s] * x(n, c, s));
        }
        const double error = (attention_error + sum_error<T>(pixels)) * size;
        const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
        if (with_context) host::require_close("context", context[nc], sum, error + context.store_error(sum));
        if (with_state) {
          host::require_close("context in state", state[nc + 2 * (n + 1)], sum, error + store_error<A>(sum));
        }
      }
    }
  }

 private:
  // Sets the logit and returns its error.
  double expect_logit(int n, int s, double& logit) const {
    const auto [images, channels, pixels] = on.shape;
    const std::size_t ns = static_cast<std::size_t>(n) * pixels + s;
    if (weighting == Weighting::kLogits) {
      logit = given_logits[ns];
      return 0;
    }
    double size = std::abs(mask_bias[0]);
    logit = mask_bias[0];
    for (int c = 0; c < channels; ++c) {
      logit += mask_weight[c] * x(n, c, s);
      size += std::abs(mask_weight[c] * x(n, c, s));
    }
    const double error = sum_error<T>(channels + 1) * size;
    host::require_close("logit", logits[ns], logit, error);
    return std::isfinite(error) ? error : 0;
  }

  // Sets the attention, checks the state's maximum and sum, and returns the attention's relative error.
  double expect_attention(int n, const std::vector<double>& logit, double logit_error,
                          std::vector<double>& attention) const {
    const auto [images, channels, pixels] = on.shape;
    double most = -kInfinity, least = kInfinity, z = 0;
    for (const double l : logit) {
      if (std::isnan(l) || l > most) most = l;
      if (std::isnan(most)) break;
      if (l > -kInfinity) least = std::min(least, l);
    }
    for (int s = 0; s < pixels; ++s) z += attention[s] = std::exp(logit[s] - most);
    for (double& a : attention) a /= z;
    if (!std::isfinite(most)) return 0;  // all attention is NaN
    // Of exp(d): its argument's error, and that of d * log2(e) before exp2.
    const double error = 2 * logit_error + Element<A>::roundoff * (4 + 2 * std::min(most - least, 100.0));
    const std::size_t n0 = static_cast<std::size_t>(n) * (channels + 2);
    host::require_close("m", state[n0], most, logit_error);
    host::require_close("z", state[n0 + 1], z, (error + sum_error<T>(pixels)) * z);
    return error + sum_error<T>(pixels);
  }
};

template <typename T>
host::Case case_of(const std::string& name, const char* reason, Weighting weighting, const ShapeCase& on, Layout layout,
                   bool wide, Special special, Paths paths = {}) {
  auto bits = std::make_shared<SameBits>();
  return {name + suffix_of(paths), reason, [=](const host::Schedule& schedule) {
            Pooling<T> pooling(weighting, on, layout, wide, special, paths);
            pooling.run(schedule);
            pooling.check();
            if (pooling.with_context) bits->check(pooling.context);
            if (pooling.with_state) bits->check(pooling.state);
          }};
}

// The newer paths of a kind of pooling.
std::vector<Paths> newer_paths(Weighting weighting) {
  if (weighting == Weighting::kMask)
    return {Path::kTilesAhead, Path::kLateMerge, {Path::kTilesAhead, Path::kLateMerge}};
  if (weighting == Weighting::kLogits) return {Path::kLateMerge};
  return {Path::kFullMachine, Path::kNeighbours, {Path::kFullMachine, Path::kNeighbours}, Path::kLateMerge};
}

// Where Path::kNeighbours puts the elements of a tile's row: a tile of 4 threads by 8, in both layouts.
template <typename T, Layout kLayout, int kWidth>
void check_neighbours(const host::Schedule& schedule) {
  using Map = typename Tile<T, kLayout, 8, kWidth, true, true>::Map;
  constexpr int kFast = 4, kSlow = 8, kRow = kFast * kElements<T>;
  Walk walk{};
  walk.channels = walk.pixels = kRow * kSlow;
  walk.splits = 1;
  walk.reciprocal = 0xffffffffu;
  walk.shape = {kFast, kSlow};
  walk.fast_shift = 2;
  std::vector<std::vector<int>> element(kFast);
  const auto kernel = [&] {
    const Map map(walk);
    if (map.slow != 0) return;
    for (int e = 0; e < kElements<T>; ++e) {
      element[map.fast].push_back(Map::kChannelsFast ? map.channel(e) : map.pixel(0, e));
    }
  };
  host::launch({1, 1, 1}, kFast * kSlow, 0, schedule, kernel, host::kMaxSharedOptIn);
  for (int fast = 0; fast < kFast; ++fast) {
    for (int e = 0; e < kElements<T>; ++e) {
      host::require(static_cast<int>(element[fast].size()) == kElements<T>, "a thread for each place of the fast axis");
      const int piece = e / kWidth, begin = (piece * kFast + fast) * kWidth;
      host::require(element[fast][e] == begin + e % kWidth, "neighbouring threads read neighbouring pieces");
    }
  }
}

template <typename T, int kWidth>
host::Case neighbours_case() {
  return {std::string("neighbours-") + Element<T>::name + "-" + std::to_string(kWidth),
          "piece k of a thread lies beside piece k of its neighbour", [](const host::Schedule& schedule) {
            check_neighbours<T, Layout::kNCHW, kWidth>(schedule);
            check_neighbours<T, Layout::kNHWC, kWidth>(schedule);
          }};
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // small vectors in the element's type and in the accumulation type take turns
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        for (const Weighting weighting : {Weighting::kMask, Weighting::kLogits, Weighting::kUniform}) {
          wide = !wide;
          const std::string name = std::string(name_of(weighting)) + "-" + Element<T>::name + "-" +
                                   gc::name_of(layout) + "-" + on.shape.to_string() +
                                   (on.misaligned ? "+" + std::to_string(on.misaligned) : "");
          list.push_back(case_of<T>(name, on.reason, weighting, on, layout, wide, Special::kNone));
          for (const Paths paths : newer_paths(weighting)) {
            list.push_back(case_of<T>(name, on.reason, weighting, on, layout, wide, Special::kNone, paths));
          }
        }
      });
    }
  }
  for (const Layout layout : kLayouts) {
    each_type(false, [&](auto element) {
      using T = decltype(element);
      const std::string name = std::string("uniform-") + Element<T>::name + "-" + gc::name_of(layout) + "-uneven";
      for (const Paths paths : newer_paths(Weighting::kUniform)) {
        list.push_back(case_of<T>(name, uneven_case().reason, Weighting::kUniform, uneven_case(), layout, true,
                                  Special::kNone, paths));
      }
    });
  }
  list.push_back(neighbours_case<float, 2>());
  list.push_back(neighbours_case<__half, 2>());
  list.push_back(neighbours_case<__half, 1>());
  struct SpecialCase {
    Special special;
    const char* name;
    const char* reason;
    bool with_mask;
  };
  const SpecialCase specials[] = {
      {Special::kAllMinusInfinity, "all_minus_inf", "an image with no weight anywhere is NaN", false},
      {Special::kFirstHalfMinusInfinity, "half_minus_inf", "whole splits without weight contribute 0", false},
      {Special::kPlusInfinity, "plus_inf", "a logit of +inf makes its image NaN", false},
      {Special::kNaN, "nan", "a NaN makes its image NaN, and no other", true},
      {Special::kInfiniteX, "inf_times_0", "0 * inf is NaN, in its channel only", false},
      {Special::kFarFromZero, "far_from_zero", "logits of 10^4, far apart: no overflow, no cancellation", false},
  };
  const ShapeCase on = {{3, 20, 332}, 12, true, 0, ""};
  for (const SpecialCase& special : specials) {
    for (const Layout layout : kLayouts) {
      each_type(true, [&](auto element) {
        using T = decltype(element);
        for (const Weighting weighting : {Weighting::kLogits, Weighting::kMask}) {
          if (weighting == Weighting::kMask && !special.with_mask) continue;
          const std::string name =
              std::string(name_of(weighting)) + "-" + Element<T>::name + "-" + gc::name_of(layout) + "-" + special.name;
          list.push_back(case_of<T>(name, special.reason, weighting, on, layout, true, special.special));
          for (const Paths paths : newer_paths(weighting)) {
            list.push_back(case_of<T>(name, special.reason, weighting, on, layout, true, special.special, paths));
          }
        }
      });
    }
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
