// transform_forward (csrc/cuda/kernels/transform_forward.h) against plain loops.
#include "cuda/kernels/transform_forward.h"

#include <optional>

#include "accuracy.h"
#include "partial_sums.h"
#include "transform_cases.h"

namespace gc::drivers {
namespace {

constexpr double kEps = 1e-5;

template <typename T>
struct Branch {
  using A = Acc<T>;

  TransformCase on;
  int images = on.images, channels = on.channels, hidden;
  bool wide;
  Gate gate;
  int misaligned = on.misaligned;
  std::string name = gate != Gate::kNone ? "mul_" : "add_";

  SmallVector<T> w1{name + "w1", static_cast<std::size_t>(hidden) * channels, wide, Use::kInput, misaligned};
  SmallVector<T> b1{name + "b1", static_cast<std::size_t>(hidden), !wide, Use::kInput};
  SmallVector<T> norm_weight{name + "norm_weight", static_cast<std::size_t>(hidden), wide, Use::kInput};
  SmallVector<T> norm_bias{name + "norm_bias", static_cast<std::size_t>(hidden), wide, Use::kInput};
  SmallVector<T> w2{name + "w2", static_cast<std::size_t>(hidden) * channels, wide, Use::kInput, misaligned};
  SmallVector<T> b2{name + "b2", static_cast<std::size_t>(channels), wide, Use::kInput};

  Buffer<A> products{name + "products", static_cast<std::size_t>(images) * hidden, Use::kOutput};
  Buffer<A> normalized{name + "normalized", static_cast<std::size_t>(images) * hidden, Use::kOutput};
  Buffer<A> inverse_deviation{name + "inverse_deviation", static_cast<std::size_t>(images), Use::kOutput};
  Buffer<A> out{name + "out", static_cast<std::size_t>(images) * channels, Use::kOutput};

  Branch(const TransformCase& on_, int hidden_, bool wide_, Gate gate_)
      : on(on_), hidden(hidden_), wide(wide_), gate(gate_) {
    Numbers numbers(gate != Gate::kNone ? 7 : 8);
    w1.fill(numbers, 2 / std::sqrt(channels));
    b1.fill(numbers, 1);
    norm_weight.fill(numbers, 2);
    norm_bias.fill(numbers, 1);
    w2.fill(numbers, 2 / std::sqrt(hidden));
    b2.fill(numbers, 1);
  }

  TransformBranch args() {
    TransformBranch args{};
    args.hidden = hidden;
    args.w1 = w1.companion();
    args.b1 = b1.companion();
    if (on.norm) {
      args.norm_weight = norm_weight.companion();
      args.norm_bias = norm_bias.companion();
    }
    args.w2 = w2.companion();
    args.b2 = b2.companion();
    args.gate = gate;
    args.products = products.data();
    args.normalized = normalized.data();
    args.inverse_deviation = inverse_deviation.data();
    args.out = out.data();
    return args;
  }

  void check(int n, const double* context) const {
    const double roundoff = Element<A>::roundoff;
    std::vector<double> h(hidden), y(hidden);
    double h_error = 0, mean = 0, variance = 0, most = 0;
    for (int p = 0; p < hidden; ++p) {
      double size = std::abs(b1[p]);
      h[p] = b1[p];
      for (int c = 0; c < channels; ++c) {
        const double product = w1[static_cast<std::size_t>(p) * channels + c] * context[c];
        h[p] += product;
        size += std::abs(product);
      }
      h_error = std::max(h_error, sum_error<T>(channels) * size);
      mean += h[p] / hidden;
    }
    for (int p = 0; p < hidden; ++p) variance += (h[p] - mean) * (h[p] - mean) / hidden;
    const double inverse = on.norm ? 1 / std::sqrt(variance + kEps) : 1;
    if (!on.norm) mean = 0;
    for (int p = 0; p < hidden; ++p) most = std::max(most, std::abs(h[p] - mean) * inverse);
    const double relative = 2 * h_error * inverse * (1 + most) + sum_error<T>(hidden);
    host::require_close("inverse_deviation", inverse_deviation[n], inverse, on.norm ? relative * inverse : 0);
    const double error = on.norm ? relative * (1 + most) : h_error;
    double y_error = 0;
    for (int p = 0; p < hidden; ++p) {
      const double value = (h[p] - mean) * inverse;
      host::require_close("normalized", normalized[static_cast<std::size_t>(n) * hidden + p], value, error);
      const double weight = on.norm ? norm_weight[p] : 1, bias = on.norm ? norm_bias[p] : 0;
      const double v = weight * value + bias;
      y[p] = activate_of(on.activation, v);
      const double v_error = std::abs(weight) * error + 4 * roundoff * (std::abs(bias) + std::abs(v));
      y_error = std::max(y_error, kSteepest * v_error + roundoff * (4 + std::abs(v)) * std::abs(y[p]));
    }
    for (int c = 0; c < channels; ++c) {
      double t = b2[c], size = std::abs(b2[c]), weights = 0;
      for (int p = 0; p < hidden; ++p) {
        const double weight = w2[static_cast<std::size_t>(c) * hidden + p];
        t += weight * y[p];
        size += std::abs(weight * y[p]);
        weights += std::abs(weight);
      }
      const double t_error = weights * y_error + sum_error<T>(hidden) * size;
      const double want = pass_gate_of(gate, t);
      const double tolerance = gate == Gate::kNone ? t_error : t_error / 4 + roundoff * (4 + std::abs(t));
      host::require_close(gate == Gate::kNone ? "term" : "scale", out[static_cast<std::size_t>(n) * channels + c], want,
                          tolerance);
    }
  }
};

// What a pooling has left, and the state that has to come of it.
struct Left {
  int splits;
  int chunks;  // 0: no softmax
  const char* reason;
};

template <typename T>
struct PartialResults {
  using A = Acc<T>;

  TransformCase on;
  Left left;
  std::size_t rows = static_cast<std::size_t>(on.images) * left.splits;
  int pixels = 5 * left.splits;
  double factor = 1.0 / pixels;

  Buffer<A> sums{"sums", rows * on.channels, Use::kInput};
  Buffer<A> stats{"stats", rows * left.chunks * 2, Use::kInput};

  PartialResults(const TransformCase& on_, const Left& left_) : on(on_), left(left_) {
    Numbers numbers(9);
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<A>(2 * numbers(1) + 0.5);
    // The chunks of an image have the same statistics.
    const std::size_t splits = left.splits;
    for (std::size_t row = 0; row < rows; ++row) {
      const A m = static_cast<A>(numbers(4)), z = static_cast<A>(3 + numbers(2));
      for (std::size_t chunk = 0; chunk < static_cast<std::size_t>(left.chunks); ++chunk) {
        A* const own = stats.data() + ((row / splits * left.chunks + chunk) * splits + row % splits) * 2;
        own[0] = m;
        own[1] = z;
      }
    }
  }

  PartialContext args(A* state) const {
    PartialContext args{};
    args.splits = left.splits;
    args.pixels = pixels;
    args.sums = sums.data();
    args.stats = left.chunks > 0 ? stats.data() : nullptr;
    args.stats_stride = 2LL * left.chunks * left.splits;
    args.factor = factor;
    args.state = state;
    return args;
  }

  void check(const Buffer<A>& state) const {
    for (int n = 0; n < on.images; ++n) {
      const A* const got = state.data() + static_cast<std::size_t>(n) * (on.channels + 2);
      const A* const own = stats.data() + static_cast<std::size_t>(n) * left.chunks * left.splits * 2;
      double m = 0, z = pixels;
      if (left.chunks > 0) {
        m = own[0], z = 0;
        for (int k = 0; k < left.splits; ++k) m = std::max<double>(m, own[2 * k]);
        for (int k = 0; k < left.splits; ++k) z += std::exp(own[2 * k] - m) * own[2 * k + 1];
      }
      // Two exponentials make a weight, each of a difference of up to 8.
      const double error = sum_error<T>(left.splits) + 32 * Element<A>::roundoff;
      host::require_close("m", got[0], m, 0);
      host::require_close("z", got[1], z, left.chunks > 0 ? error * z : 0);
      for (int c = 0; c < on.channels; ++c) {
        double sum = 0, size = 0;
        for (int k = 0; k < left.splits; ++k) {
          const double weight = left.chunks > 0 ? std::exp(own[2 * k] - m) / z : factor;
          const double value = sums[(static_cast<std::size_t>(n) * left.splits + k) * on.channels + c];
          sum += weight * value;
          size += weight * std::abs(value);
        }
        host::require_close("context", got[2 + c], sum, 2 * error * size);
      }
    }
    // Each partial sum is read by one thread, the statistics by the first threads of each warp and slice.
    const std::size_t slices = (on.channels + 31) / 32;
    const std::size_t statistics = left.chunks > 0 ? rows * 2 * slices * sizeof(A) : 0;
    host::require(!host::kRaceBuild || (sums.traffic().read == sums.bytes() && stats.traffic().read == statistics &&
                                        state.traffic().written == state.bytes()),
                  "partial results are read once, and the state is written once");
  }
};

template <typename T>
void run(const TransformCase& on, bool wide, SameBits& bits, const host::Schedule& schedule,
         const std::optional<Left>& left = {}) {
  using A = Acc<T>;
  // The context lies in the state of the pooling, behind two statistics.
  const int stride = on.channels + 2;
  Buffer<A> state("state", static_cast<std::size_t>(on.images) * stride, left ? Use::kOutput : Use::kInput);
  Numbers numbers(6);
  for (std::size_t i = 0; !left && i < state.size(); ++i) state[i] = static_cast<A>(numbers(1) + 0.25);
  std::optional<PartialResults<T>> partial;
  if (left) partial.emplace(on, *left);
  std::vector<std::unique_ptr<Branch<T>>> branches;
  for (int b = 0; b < on.branches(); ++b) {
    branches.push_back(std::make_unique<Branch<T>>(on, on.hidden[b], wide, gate_of(on, b, wide)));
  }

  const TransformProblem problem = problem_of(on, Element<T>::type);
  DeviceLimits device = device_of(on, schedule);
  if (left) device.paths = device.paths | Path::kLateMerge;
  const TransformPlan plan = make_transform_forward_plan(problem, device);
  PhaseCounters counters(plan);
  TransformForwardArgs args{};
  args.counters = counters.data();
  args.images = on.images;
  args.channels = on.channels;
  args.branches = on.branches();
  args.eps = kEps;
  args.activation = on.activation;
  args.context = state.data() + 2;
  args.context_stride = stride;
  if (left) args.partial = partial->args(state.data());
  std::size_t products = 0;
  for (int b = 0; b < on.branches(); ++b) {
    args.branch[b] = branches[b]->args();
    products += branches[b]->products.size();
  }
  host::require(static_cast<std::size_t>(plan.workspace) == products, "workspace of " + plan.to_string());
  run_launch(plan, schedule, [&] { return launch_transform_forward(plan, args, nullptr); });

  counters.check();
  if (left) {
    partial->check(state);
    bits.check(state);
  }
  // A row is fetched once for each tile of images at most: the tiles that a block takes share it.
  const int reads = image_tiles(on.images, plan.tile_images);
  const auto require_fetched = [&](const auto& matrix) {
    const host::Traffic traffic = matrix.traffic();
    host::require(!host::kRaceBuild || (traffic.fetched >= matrix.bytes() && traffic.fetched <= reads * matrix.bytes()),
                  matrix.name() + ": " + std::to_string(traffic.fetched) + " bytes fetched, expected 1 to " +
                      std::to_string(reads) + " passes over " + std::to_string(matrix.bytes()) + " bytes");
    require_prefetched(matrix, plan.paths.has(Path::kEarlyStart) ? 1 : 0);
  };
  for (const auto& branch : branches) {
    branch->w1.with_buffer(require_fetched);
    branch->w2.with_buffer(require_fetched);
    bits.check(branch->products);
    bits.check(branch->normalized);
    bits.check(branch->out);
    for (int n = 0; n < on.images; ++n) {
      const A* const context = state.data() + static_cast<std::size_t>(n) * stride + 2;
      branch->check(n, std::vector<double>(context, context + on.channels).data());
    }
  }
}

// The root of the mean square of what rounding leaves in sums over the splits, of merge_late and of the order in which
// pool_forward merges in two rounds.
void run_accuracy(int splits, const host::Schedule& schedule) {
  const TransformCase on{2, 1024, {4}, 2, false, false, ""};
  PartialResults<float> partial(on, {splits, 0, ""});
  partial.factor = 1;
  Branch<float> branch(on, 4, false, Gate::kNone);
  Buffer<float> state("state", static_cast<std::size_t>(on.images) * (on.channels + 2), Use::kOutput);
  DeviceLimits device = device_of(on);
  device.paths = Path::kLateMerge;
  const TransformPlan plan = make_transform_forward_plan(problem_of(on, ElementType::kFloat), device);
  PhaseCounters counters(plan);
  TransformForwardArgs args{};
  args.counters = counters.data();
  args.images = on.images;
  args.channels = on.channels;
  args.branches = 1;
  args.eps = kEps;
  args.context = state.data() + 2;
  args.context_stride = on.channels + 2;
  args.branch[0] = branch.args();
  args.partial = partial.args(state.data());
  run_launch(plan, schedule, [&] { return launch_transform_forward(plan, args, nullptr); });

  double late = 0, rounds = 0;
  for (int n = 0; n < on.images; ++n) {
    for (int c = 0; c < on.channels; ++c) {
      double sum = 0;
      std::vector<float> values;
      for (int k = 0; k < splits; ++k) {
        const float value = partial.sums[(static_cast<std::size_t>(n) * splits + k) * on.channels + c];
        sum += value;
        values.push_back(value);
      }
      const float other = sum_in_rounds(values);
      const float got = state[static_cast<std::size_t>(n) * (on.channels + 2) + 2 + c];
      late += (got - sum) * (got - sum);
      rounds += (other - sum) * (other - sum);
    }
  }
  late = std::sqrt(late), rounds = std::sqrt(rounds);
  if (std::getenv("GC_HOST_ERRORS") != nullptr) std::printf("%d splits: %g, in two rounds %g\n", splits, late, rounds);
  host::require(late <= rounds, "merging late leaves " + std::to_string(late / rounds) + " of the error of two rounds");
}

std::vector<host::Case> late_cases() {
  struct LateCase {
    TransformCase on;
    Left left;
  };
  const LateCase all[] = {
      {{1, 1, {1}, 4, true, false, ""}, {2, 1, "the smallest: one channel, two splits"}},
      {{2, 33, {5}, 1, true, false, ""}, {9, 1, "warps with two splits or none; slices that a block takes in turn"}},
      {{3, 64, {16, 8}, 4, true, false, ""}, {40, 0, "a mean: no softmax and no statistics"}},
      {{2, 1100, {72}, 8, false, false, ""}, {132, 1, "as many splits as an H100 has multiprocessors"}},
      {{2, 40, {6}, 2, true, false, ""}, {256, 3, "the most splits, and several chunks of channels"}},
  };
  std::vector<host::Case> list;
  for (const auto& [on, left] : all) {
    each_type(on.all_types, [&, on = on, left = left](auto element) {
      using T = decltype(element);
      auto bits = std::make_shared<SameBits>();
      list.push_back(
          {std::string("late-") + Element<T>::name + "-" + on.to_string() + "-" + std::to_string(left.splits),
           left.reason, [=](const host::Schedule& schedule) { run<T>(on, false, *bits, schedule, left); }});
    });
  }
  for (const int splits : {5, 8, 9, 40, 132, 256}) {
    list.push_back(accuracy_case("merge-of-" + std::to_string(splits),
                                 "rounding, where all partial results count alike",
                                 [=](const host::Schedule& schedule) { run_accuracy(splits, schedule); }));
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) {
  using namespace gc::drivers;
  using gc::host::Schedule;
  std::vector<gc::host::Case> cases = cases_of(
      "forward", false, [](auto element, const TransformCase& on, bool wide, SameBits& bits, const Schedule& schedule) {
        run<decltype(element)>(on, wide, bits, schedule);
      });
  // The addresses of weights decide on the width of loads, and on nothing that rounds.
  const std::vector<gc::host::Case> alignments = cases_of(
      "any_address", true, [](auto element, TransformCase on, bool wide, SameBits& bits, const Schedule& schedule) {
        for (const bool misaligned : {false, true}) {
          on.misaligned = misaligned;
          run<decltype(element)>(on, wide, bits, schedule);
        }
      });
  cases.insert(cases.end(), alignments.begin(), alignments.end());
  const std::vector<gc::host::Case> late = late_cases();
  cases.insert(cases.end(), late.begin(), late.end());
  return gc::host::run_cases(argc, argv, cases);
}
