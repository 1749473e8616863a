// residual (csrc/cuda/kernels/residual.h) against plain loops.
#include <limits>

#include "norm_cases.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

// What a call adds to the norm.
struct Parts {
  bool scale, term, identity, relu;

  std::string to_string() const {
    std::string text;
    if (scale) text += "-scale";
    if (term) text += "-term";
    if (identity) text += "-identity";
    return text + (relu ? "-relu" : "");
  }
};

template <typename T>
void run(const Parts& parts, NormSource source, const ShapeCase& on, Layout layout, bool wide, bool with_nan,
         SameBits& bits, const host::Schedule& schedule) {
  using A = Acc<T>;
  const auto [images, channels, pixels] = on.shape;
  const std::size_t rows = static_cast<std::size_t>(images) * channels;
  Numbers numbers(23);
  FeatureMap<T> y("y", on.shape, layout, Use::kInput, on.misaligned);
  FeatureMap<T> identity("identity", on.shape, layout, Use::kInput, on.misaligned);
  FeatureMap<T> out("out", on.shape, layout, Use::kOutput, on.misaligned);
  const Norm<T> norm(source, channels, wide);
  SmallVector<T> scale("scale", rows, true, Use::kInput), term("term", rows, true, Use::kInput);
  norm.fill(y, on.shape);
  identity.fill(numbers, 2);
  scale.fill(numbers, 1);
  term.fill(numbers, 3);
  if (with_nan) y.set(images - 1, channels / 2, pixels / 2, std::numeric_limits<double>::quiet_NaN());

  const Plan plan = plan_for<T>(KernelKind::kResidual, on.shape, layout, on.multiprocessors, false, on.misaligned,
                                paths_under(schedule));
  ResidualArgs args{};
  args.y = y.buffer().data();
  if (parts.identity) args.identity = identity.buffer().data();
  args.norm = norm.args();
  if (parts.scale) args.scale = scale.companion().data;
  if (parts.term) args.term = term.companion().data;
  args.relu = parts.relu;
  args.out = out.buffer().data();
  // Of given statistics a copy is kept; those of the batch are, already.
  const bool keeps = source != NormSource::kKept;
  std::vector<std::unique_ptr<Buffer<A>>> kept;
  for (const char* const name : {"kept_mean", "kept_inverse_std", "kept_variance", "kept_bias"}) {
    kept.push_back(std::make_unique<Buffer<A>>(name, channels, Use::kOutput));
  }
  if (keeps) args.kept = {kept[0]->data(), kept[1]->data(), kept[2]->data(), kept[3]->data()};
  run_launch(plan, schedule, [&] { return launch_residual(plan, args, nullptr); });

  const double roundoff = Element<A>::roundoff;
  for (int n = 0; n < images; ++n) {
    for (int c = 0; c < channels; ++c) {
      const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
      const double times = parts.scale ? scale[nc] : 1;
      const double shift = norm.bias(c) * times + (parts.term ? term[nc] : 0);
      for (int s = 0; s < pixels; ++s) {
        const double product = (y(n, c, s) - norm.mean(c)) * norm.slope(c) * times;
        const double added = parts.identity ? identity(n, c, s) : 0;
        double want = product + shift + added;
        // Beside the deviation, not beside y.
        const double size = std::abs(product) + std::abs(norm.bias(c) * times) + std::abs(shift) + std::abs(added);
        if (parts.relu && want < 0) want = 0;
        host::require_close("out", out(n, c, s), want, store_error<T>(want) + 8 * roundoff * size);
      }
    }
  }
  for (int c = 0; keeps && c < channels; ++c) {
    host::require_close("kept mean", (*kept[0])[c], norm.mean(c), 0);
    host::require_close("kept inverse_std", (*kept[1])[c], norm.inverse_std(c), norm.none() ? 0 : 4 * roundoff);
    host::require_close("kept variance", (*kept[2])[c], norm.none() ? 1 : norm.variance[c], 0);
    host::require_close("kept bias", (*kept[3])[c], norm.bias(c), 0);
  }
  require_passes(y.buffer(), 1, 0);
  require_passes(identity.buffer(), parts.identity ? 1 : 0, 0);
  require_passes(out.buffer(), 0, 1);
  for (const auto& one : kept) require_passes(*one, 0, keeps ? 1 : 0);
  bits.check(out.buffer());
}

// With what a context block gives, or without, and with what may be absent.
constexpr Parts kParts[] = {{false, true, true, true},
                            {true, false, true, true},
                            {true, true, false, true},
                            {false, false, true, false},
                            {true, true, true, false}};

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // parameters in the element's type and in the accumulation type take turns
  int source = 0;
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        for (const Parts& parts : kParts) {
          wide = !wide;
          const NormSource from = kNormSources[++source % 3];
          const std::string name = std::string(Element<T>::name) + "-" + gc::name_of(layout) + "-" +
                                   on.shape.to_string() + (on.misaligned ? "+" + std::to_string(on.misaligned) : "") +
                                   "-" + name_of(from) + parts.to_string();
          auto bits = std::make_shared<SameBits>();
          list.push_back({name, on.reason, [=, wide = wide](const host::Schedule& schedule) {
                            run<T>(parts, from, on, layout, wide, false, *bits, schedule);
                          }});
        }
      });
    }
  }
  for (const ShapeCase& on : {ShapeCase{{2, 33, 50}, 4, true, 0, ""}, ShapeCase{{2, 40, 49}, 4, true, 0, ""}}) {
    for (const Layout layout : kLayouts) {
      each_type(true, [&](auto element) {
        using T = decltype(element);
        auto bits = std::make_shared<SameBits>();
        list.push_back({std::string(Element<T>::name) + "-" + gc::name_of(layout) + "-" + on.shape.to_string() + "-nan",
                        "a NaN passes the ReLU, and reaches no other element", [=](const host::Schedule& schedule) {
                          run<T>(kParts[0], NormSource::kGiven, on, layout, true, true, *bits, schedule);
                        }});
      });
    }
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
