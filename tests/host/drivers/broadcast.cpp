// broadcast and broadcast_mul_backward (csrc/cuda/kernels/broadcast.h) against plain loops.
#include "feature_map.h"
#include "partial_sums.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

enum class Form { kAdd, kMul, kMulAdd };

const char* name_of(Form form) { return form == Form::kAdd ? "add" : form == Form::kMul ? "mul" : "mul_add"; }

template <typename T>
void run_forward(Form form, const ShapeCase& on, Layout layout, bool wide, Paths paths, SameBits& bits,
                 const host::Schedule& schedule) {
  const auto [images, channels, pixels] = on.shape;
  Numbers numbers(1);
  FeatureMap<T> x("x", on.shape, layout, Use::kInput, on.misaligned);
  FeatureMap<T> out("out", on.shape, layout, Use::kOutput, on.misaligned);
  SmallVector<T> scale("scale", images * channels, wide, Use::kInput);
  SmallVector<T> term("term", images * channels, wide, Use::kInput);
  x.fill(numbers, 2);
  scale.fill(numbers, 1);
  term.fill(numbers, 3);

  const Plan plan = plan_for<T>(KernelKind::kBroadcast, on.shape, layout, on.multiprocessors, false, on.misaligned,
                                paths | paths_under(schedule));
  BroadcastArgs args{};
  args.x = x.buffer().data();
  if (form != Form::kAdd) args.scale = scale.companion();
  if (form != Form::kMul) args.term = term.companion();
  args.out = out.buffer().data();
  run_launch(plan, schedule, [&] { return launch_broadcast(plan, args, nullptr); });

  for (int n = 0; n < images; ++n) {
    for (int c = 0; c < channels; ++c) {
      const double times = form == Form::kAdd ? 1 : scale[n * channels + c];
      const double plus = form == Form::kMul ? 0 : term[n * channels + c];
      for (int s = 0; s < pixels; ++s) {
        const double product = x(n, c, s) * times;
        const double rounding = 2 * Element<Acc<T>>::roundoff * (std::abs(product) + std::abs(plus));
        host::require_close("out", out(n, c, s), product + plus, store_error<T>(product + plus) + rounding);
      }
    }
  }
  require_passes(x.buffer(), 1, 0);
  require_passes(out.buffer(), 0, 1);
  bits.check(out.buffer());
}

// What a caller wants of the backward.
enum class Wanted { kAll, kBothSums, kScaleOnly };

const char* name_of(Wanted wanted) {
  return wanted == Wanted::kAll ? "mul_backward" : wanted == Wanted::kBothSums ? "mul_sums" : "mul_sum";
}

template <typename T>
void run_backward(Wanted wanted, const ShapeCase& on, Layout layout, bool wide, Paths paths, SameBits& bits,
                  const host::Schedule& schedule) {
  const auto [images, channels, pixels] = on.shape;
  Numbers numbers(2);
  FeatureMap<T> grad("grad", on.shape, layout, Use::kInput, on.misaligned);
  FeatureMap<T> x("x", on.shape, layout, Use::kInput, on.misaligned);
  FeatureMap<T> grad_x("grad_x", on.shape, layout, Use::kOutput, on.misaligned);
  SmallVector<T> scale("scale", images * channels, wide, Use::kInput);
  SmallVector<T> grad_scale("grad_scale", images * channels, wide, Use::kOutput);
  SmallVector<T> grad_term("grad_term", images * channels, !wide, Use::kOutput);
  grad.fill(numbers, 1);
  x.fill(numbers, 2);
  scale.fill(numbers, 1);

  const Plan plan =
      plan_for<T>(KernelKind::kBroadcastMulBackward, on.shape, layout, on.multiprocessors, false, on.misaligned, paths);
  const int splits = plan.walk.splits;
  host::require(plan.paths == (splits > 1 ? paths : Paths{}), "a plan that takes its paths: " + plan.to_string());
  Buffer<Acc<T>> partial_sums("partial_sums", plan.workspace, Use::kOutput);
  Tickets tickets(plan);
  BroadcastMulBackwardArgs args{};
  args.grad = grad.buffer().data();
  args.x = x.buffer().data();
  const bool with_map = wanted == Wanted::kAll;
  const bool with_term = wanted != Wanted::kScaleOnly;
  if (with_map) args.scale = scale.companion();
  if (with_map) args.grad_x = grad_x.buffer().data();
  args.grad_scale = grad_scale.out();
  if (with_term) args.grad_term = grad_term.out();
  args.partial_sums = partial_sums.data();
  args.tickets = tickets.data();
  run_launch(plan, schedule, [&] { return launch_broadcast_mul_backward(plan, args, nullptr); });
  if (plan.walk.merged_later) {  // so far it has left partial results only
    const std::size_t all = static_cast<std::size_t>(images) * channels;
    host::require(plan.tickets == 0 && partial_sums.size() == 2 * all * splits, "workspace of " + plan.to_string());
    for (std::size_t i = 0; i < all; ++i) {
      const auto sum = [&](std::size_t first) {
        std::vector<Acc<T>> values;
        for (int k = 0; k < splits; ++k) {
          values.push_back(partial_sums[first + (i / channels * splits + k) * channels + i % channels]);
        }
        return sum_in_rounds(values);
      };
      grad_scale.set(i, sum(0));
      if (with_term) grad_term.set(i, sum(all * splits));
    }
  }

  for (int n = 0; n < images; ++n) {
    for (int c = 0; c < channels; ++c) {
      const int nc = n * channels + c;
      double product_sum = 0, product_size = 0, grad_sum = 0, grad_size = 0;
      for (int s = 0; s < pixels; ++s) {
        const double g = grad(n, c, s);
        product_sum += g * x(n, c, s);
        product_size += std::abs(g * x(n, c, s));
        grad_sum += g;
        grad_size += std::abs(g);
        if (!with_map) continue;
        const double want = g * scale[nc];
        host::require_close("grad_x", grad_x(n, c, s), want,
                            store_error<T>(want) + Element<Acc<T>>::roundoff * std::abs(want));
      }
      const double error = sum_error<T>(pixels);
      host::require_close("grad_scale", grad_scale[nc], product_sum,
                          grad_scale.store_error(product_sum) + error * product_size);
      if (!with_term) continue;
      host::require_close("grad_term", grad_term[nc], grad_sum, grad_term.store_error(grad_sum) + error * grad_size);
    }
  }
  tickets.check();
  require_passes(grad.buffer(), 1, 0);
  require_passes(x.buffer(), 1, 0);
  require_passes(grad_x.buffer(), 0, with_map ? 1 : 0);
  if (with_map) bits.check(grad_x.buffer());
  bits.check(grad_scale);
  if (with_term) bits.check(grad_term);
  if (plan.workspace > 0 && args.grad_term.data != nullptr) bits.check(partial_sums);
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // small vectors in the element's type and in the accumulation type take turns
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        const std::string name = std::string("-") + Element<T>::name + "-" + gc::name_of(layout) + "-" +
                                 on.shape.to_string() + (on.misaligned ? "+" + std::to_string(on.misaligned) : "");
        for (const Form form : {Form::kAdd, Form::kMul, Form::kMulAdd}) {
          wide = !wide;
          for (const Paths paths : {Paths{}, Paths(Path::kFullMachine)}) {
            auto bits = std::make_shared<SameBits>();
            list.push_back(
                {name_of(form) + name + suffix_of(paths), on.reason, [=, wide = wide](const host::Schedule& schedule) {
                   run_forward<T>(form, on, layout, wide, paths, *bits, schedule);
                 }});
          }
        }
        for (const Wanted wanted : {Wanted::kAll, Wanted::kBothSums, Wanted::kScaleOnly}) {
          for (const Paths paths : {Paths{}, Paths(Path::kLateMerge)}) {
            if (wanted == Wanted::kAll && !(paths == Paths{})) continue;  // no transform follows
            auto bits = std::make_shared<SameBits>();
            list.push_back({name_of(wanted) + name + suffix_of(paths), on.reason,
                            [=, wide = wide](const host::Schedule& schedule) {
                              run_backward<T>(wanted, on, layout, wide, paths, *bits, schedule);
                            }});
          }
        }
      });
    }
  }
  auto bits = std::make_shared<SameBits>();
  list.push_back({"mul_add-float32-NCHW-uneven", uneven_case().reason, [=](const host::Schedule& schedule) {
                    run_forward<float>(Form::kMulAdd, uneven_case(), Layout::kNCHW, false, Path::kFullMachine, *bits,
                                       schedule);
                  }});
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
