// residual_sums (csrc/cuda/kernels/residual_sums.h) against plain loops.
#include "accuracy.h"
#include "feature_map.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

struct Form {
  const char* name;
  bool masks, products;
};
constexpr Form kForms[] = {
    {"sum", false, false}, {"masked_sum", true, false}, {"sums", false, true}, {"masked_sums", true, true}};

template <typename T>
struct Sums {
  using A = Acc<T>;

  Form form;
  ShapeCase on;
  Layout layout;

  FeatureMap<T> grad{"grad", on.shape, layout, Use::kInput, on.misaligned};
  FeatureMap<T> out{"out", on.shape, layout, Use::kInput, on.misaligned};
  FeatureMap<T> y{"y", on.shape, layout, Use::kInput, on.misaligned};
  FeatureMap<T> grad_in{"grad_in", on.shape, layout, Use::kOutput, on.misaligned};
  Buffer<A> mean{"mean", static_cast<std::size_t>(on.shape.channels), Use::kInput};
  Buffer<A> sums{"sums", channels_in_all(), Use::kOutput};
  Buffer<A> product_sums{"product_sums", channels_in_all(), Use::kOutput};

  Sums(const Form& form_, const ShapeCase& on_, Layout layout_) : form(form_), on(on_), layout(layout_) {
    Numbers numbers(7);
    grad.fill(numbers, 1);
    out.fill(numbers, 1);
    y.fill(numbers, 2);
    for (std::size_t c = 0; c < mean.size(); ++c) mean[c] = static_cast<A>(numbers(1));
  }

  std::size_t channels_in_all() const { return static_cast<std::size_t>(on.shape.images) * on.shape.channels; }

  void run(const host::Schedule& schedule, SameBits& bits) {
    const Plan plan =
        plan_for<T>(KernelKind::kResidualSums, on.shape, layout, on.multiprocessors, false, on.misaligned);
    Buffer<A> partial_sums("partial_sums", plan.workspace, Use::kOutput);
    Tickets tickets(plan);
    ResidualSumsArgs args{};
    args.grad = grad.buffer().data();
    if (form.masks) {
      args.out = out.buffer().data();
      args.grad_in = grad_in.buffer().data();
    }
    args.sums = sums.data();
    if (form.products) {
      args.y = y.buffer().data();
      args.mean = {mean.data(), true};
      args.product_sums = product_sums.data();
    }
    args.partial_sums = partial_sums.data();
    args.tickets = tickets.data();
    run_launch(plan, schedule, [&] { return launch_residual_sums(plan, args, nullptr); });
    tickets.check();
    require_passes(grad.buffer(), 1, 0);
    require_passes(out.buffer(), form.masks, 0);
    require_passes(y.buffer(), form.products, 0);
    require_passes(grad_in.buffer(), 0, form.masks);
    if (form.masks) bits.check(grad_in.buffer());
    bits.check(sums);
    if (form.products) bits.check(product_sums);
  }

  double let_through(int n, int c, int s) const { return form.masks && out(n, c, s) <= 0 ? 0.0 : grad(n, c, s); }

  void check() const {
    const auto [images, channels, pixels] = on.shape;
    for (int n = 0; n < images; ++n) {
      for (int c = 0; c < channels; ++c) {
        double sum = 0, size = 0, product_sum = 0, product_size = 0;
        for (int s = 0; s < pixels; ++s) {
          const double g = let_through(n, c, s);
          if (form.masks) host::require_close("grad_in", grad_in(n, c, s), g, 0);
          sum += g;
          size += std::abs(g);
          product_sum += g * (y(n, c, s) - mean[c]);
          product_size += std::abs(g * (y(n, c, s) - mean[c]));
        }
        const double error = sum_error<T>(pixels);
        const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
        host::require_close("sums", sums[nc], sum, store_error<A>(sum) + error * size);
        if (!form.products) continue;
        host::require_close("product_sums", product_sums[nc], product_sum,
                            store_error<A>(product_sum) + error * product_size);
      }
    }
  }
};

// What is no number: grad passes where out is NaN, and nothing does where out is 0, not even NaN.
template <typename T>
void run_not_finite(Layout layout, const host::Schedule& schedule) {
  const ShapeCase on{{2, 5, 40}, 4, false, 0, ""};
  Sums<T> sums(kForms[3], on, layout);
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  sums.out.set(0, 0, 3, nan);
  sums.grad.set(0, 0, 3, 1);
  sums.out.set(0, 1, 4, 0);
  sums.grad.set(0, 1, 4, nan);
  sums.out.set(0, 2, 5, -0.0);
  sums.grad.set(0, 2, 5, infinity);
  sums.out.set(0, 3, 6, 1);
  sums.grad.set(0, 3, 6, nan);
  sums.out.set(1, 4, 7, infinity);
  sums.grad.set(1, 4, 7, -infinity);
  SameBits bits;
  sums.run(schedule, bits);
  sums.check();
}

// A mean far larger than the deviation.
void run_far_from_zero(Layout layout, const host::Schedule& schedule) {
  const ShapeCase on{{2, 16, 2100}, 4, false, 0, ""};
  Sums<float> sums(kForms[3], on, layout);
  const Pattern y(1, 10), grad(2, 20);
  const auto [images, channels, pixels] = on.shape;
  LargestError error;
  for (int c = 0; c < channels; ++c) sums.mean[c] = 1000;
  for (int pass = 0; pass < 2; ++pass) {  // fills, then compares
    for (int n = 0; n < images; ++n) {
      for (int c = 0; c < channels; ++c) {
        double sum = 0;
        for (int s = 0; s < pixels; ++s) {
          const std::size_t i = (static_cast<std::size_t>(n) * channels + c) * pixels + s;
          if (pass == 0) sums.y.set(n, c, s, y(i) + 1000);
          if (pass == 0) sums.grad.set(n, c, s, grad(i));
          sum += sums.let_through(n, c, s) * y(i);
        }
        if (pass == 1) error.add(sums.product_sums[static_cast<std::size_t>(n) * channels + c], sum);
      }
    }
    if (pass == 1) break;
    SameBits bits;
    sums.run(schedule, bits);
  }
  error.require("product_sums", 4);
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        for (const Form& form : kForms) {
          const std::string name = std::string(form.name) + "-" + Element<T>::name + "-" + gc::name_of(layout) + "-" +
                                   on.shape.to_string() + (on.misaligned ? "+" + std::to_string(on.misaligned) : "");
          auto bits = std::make_shared<SameBits>();
          list.push_back({name, on.reason, [=](const host::Schedule& schedule) {
                            Sums<T> sums(form, on, layout);
                            sums.run(schedule, *bits);
                            sums.check();
                          }});
        }
      });
    }
  }
  for (const Layout layout : kLayouts) {
    list.push_back({std::string("not_finite-float32-") + gc::name_of(layout), "NaN and infinity in grad and out",
                    [=](const host::Schedule& schedule) { run_not_finite<float>(layout, schedule); }});
    list.push_back({std::string("not_finite-float16-") + gc::name_of(layout), "the same, packed",
                    [=](const host::Schedule& schedule) { run_not_finite<__half>(layout, schedule); }});
    list.push_back(accuracy_case(std::string("far_from_zero-") + gc::name_of(layout), "the mean of y is in no sum",
                                 [=](const host::Schedule& schedule) { run_far_from_zero(layout, schedule); }));
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
