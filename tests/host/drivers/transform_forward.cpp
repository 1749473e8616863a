// transform_forward (csrc/cuda/kernels/transform_forward.h) against plain loops.
#include "cuda/kernels/transform_forward.h"

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

template <typename T>
void run(const TransformCase& on, bool wide, SameBits& bits, const host::Schedule& schedule) {
  using A = Acc<T>;
  // The context lies in the state of the pooling, behind two statistics.
  const int stride = on.channels + 2;
  Buffer<A> state("state", static_cast<std::size_t>(on.images) * stride, Use::kInput);
  Numbers numbers(6);
  for (std::size_t i = 0; i < state.size(); ++i) state[i] = static_cast<A>(numbers(1) + 0.25);
  std::vector<std::unique_ptr<Branch<T>>> branches;
  for (int b = 0; b < on.branches(); ++b) {
    branches.push_back(std::make_unique<Branch<T>>(on, on.hidden[b], wide, gate_of(on, b, wide)));
  }

  const TransformProblem problem = problem_of(on, Element<T>::type);
  const TransformPlan plan = make_transform_forward_plan(problem, device_of(on, schedule));
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
  std::size_t products = 0;
  for (int b = 0; b < on.branches(); ++b) {
    args.branch[b] = branches[b]->args();
    products += branches[b]->products.size();
  }
  host::require(static_cast<std::size_t>(plan.workspace) == products, "workspace of " + plan.to_string());
  run_launch(plan, schedule, [&] { return launch_transform_forward(plan, args, nullptr); });

  counters.check();
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
  return gc::host::run_cases(argc, argv, cases);
}
