// grad_y and norm_gradients (csrc/cuda/kernels/grad_y.h, norm_gradients.h) against plain loops over the formulas.
#include "accuracy.h"
#include "feature_map.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

// What there is of a block, and whose statistics the norm has.
struct Form {
  const char* name;
  bool of_batch = false;
  bool block = false, attention = false, scaled = false;
  bool affine = true;     // the norm has a weight and a bias
  bool gradients = true;  // of the norm's parameters
};
constexpr Form kForms[] = {
    {"plain", false, false, false, false, true, false},
    {"plain_norm", false, false, false, false, false},
    {"mean_mul", false, true, false, true},
    {"attention", false, true, true, false},
    {"attention_mul", false, true, true, true},
    {"plain_batch", true},
    {"mean_mul_batch", true, true, false, true},
    {"attention_batch", true, true, true, false},
    {"attention_mul_batch", true, true, true, true, false},
};

// What norm_gradients is launched with.
struct NormPlan {
  int channels;
  Paths paths = {};
  int shared_bytes = 0;
  std::string to_string() const { return "norm_gradients of " + std::to_string(channels); }
};

template <typename T>
struct Last {
  using A = Acc<T>;

  Form form;
  ShapeCase on;
  Layout layout;
  bool wide;  // the small vectors

  FeatureMap<T> grad{"grad", on.shape, layout, Use::kInput, on.misaligned};
  FeatureMap<T> y{"y", on.shape, layout, Use::kInput, on.misaligned};
  FeatureMap<T> grad_y{"grad_y", on.shape, layout, Use::kOutput, on.misaligned};
  SmallVector<T> mean{"mean", channels(), true, Use::kInput};
  SmallVector<T> inverse_std{"inverse_std", channels(), true, Use::kInput};
  SmallVector<T> weight{"weight", channels(), wide, Use::kInput};
  SmallVector<T> mask_weight{"mask_weight", channels(), wide, Use::kInput};
  Buffer<A> sums{"sums", channels_in_all(), Use::kInput};
  Buffer<A> product_sums{"product_sums", channels_in_all(), Use::kInput};
  Buffer<A> scale{"scale", channels_in_all(), Use::kInput};
  Buffer<A> grad_context{"grad_context", channels_in_all(), Use::kInput};
  Buffer<A> state{"state", channels_in_all() + 2 * on.shape.images, Use::kInput};
  Buffer<A> attention{"attention", pixels_in_all(), Use::kInput};
  Buffer<A> grad_logits{"grad_logits", pixels_in_all(), Use::kInput};
  Buffer<A> grad_folded{"grad_folded", channels(), Use::kInput};

  Buffer<A> weight_sum{"weight_sum", channels(), Use::kOutput};
  Buffer<A> bias_sum{"bias_sum", channels(), Use::kOutput};
  SmallVector<T> grad_weight{"grad_weight", channels(), !wide, Use::kOutput};
  SmallVector<T> grad_bias{"grad_bias", channels(), wide, Use::kOutput};
  SmallVector<T> grad_mask_weight{"grad_mask_weight", channels(), !wide, Use::kOutput};

  Last(const Form& form_, const ShapeCase& on_, Layout layout_, bool wide_)
      : form(form_), on(on_), layout(layout_), wide(wide_) {
    Numbers numbers(11);
    grad.fill(numbers, 1);
    y.fill(numbers, 2);
    mean.fill(numbers, 1);
    weight.fill(numbers, 1);
    mask_weight.fill(numbers, 1);
    weight.set(0, 0);  // as zero-initialised
    for (std::size_t c = 0; c < channels(); ++c) inverse_std.set(c, 1 + numbers(0.5));
    for (Buffer<A>* const one : {&sums, &product_sums, &scale, &grad_context, &state, &grad_logits, &grad_folded}) {
      for (std::size_t i = 0; i < one->size(); ++i) (*one)[i] = static_cast<A>(numbers(1));
    }
    for (std::size_t i = 0; i < attention.size(); ++i) attention[i] = static_cast<A>(std::abs(numbers(1)));
  }

  std::size_t channels() const { return static_cast<std::size_t>(on.shape.channels); }
  std::size_t channels_in_all() const { return on.shape.images * channels(); }
  std::size_t pixels_in_all() const { return static_cast<std::size_t>(on.shape.images) * on.shape.pixels; }
  double slope(int c) const { return (form.affine ? weight[c] : 1) * inverse_std[c]; }
  double scale_of(std::size_t nc) const { return form.scaled ? scale[nc] : 1.0; }
  double grad_context_of(std::size_t nc) const { return form.block ? grad_context[nc] : 0.0; }

  NormArgs norm() {
    NormArgs norm{};
    norm.mean = mean.companion();
    norm.inverse_std = inverse_std.companion();
    if (form.affine) norm.weight = weight.companion();
    return norm;
  }

  NormGradientsArgs gradients_args() {
    NormGradientsArgs args{};
    args.norm = norm();
    args.images = on.shape.images;
    args.channels = on.shape.channels;
    args.sums = sums.data();
    args.product_sums = product_sums.data();
    if (form.scaled) args.scale = scale.data();
    if (form.block) args.grad_context = grad_context.data();
    if (form.block) args.state = state.data();
    if (form.attention) {
      args.grad_folded = grad_folded.data();
      args.mask_weight = mask_weight.companion();
      args.grad_mask_weight = grad_mask_weight.out();
    }
    args.weight_sum = weight_sum.data();
    args.bias_sum = bias_sum.data();
    args.grad_weight = grad_weight.out();
    args.grad_bias = grad_bias.out();
    return args;
  }

  // Whoever computes them, they have the same bits.
  void check_bits(SameBits& bits) {
    bits.check(weight_sum);
    bits.check(bias_sum);
    bits.check(grad_weight);
    bits.check(grad_bias);
    if (form.attention) bits.check(grad_mask_weight);
  }

  void run(const host::Schedule& schedule, SameBits& bits) {
    const NormGradientsArgs gradients = gradients_args();
    if (form.gradients) {
      const NormPlan plan{on.shape.channels};
      run_launch(plan, schedule, [&] { return launch_norm_gradients(Element<T>::type, gradients, nullptr); });
      check_bits(bits);
    }
    const Plan plan = plan_for<T>(KernelKind::kGradY, on.shape, layout, on.multiprocessors, false, on.misaligned);
    GradYArgs args{};
    args.norm = norm();
    args.grad = grad.buffer().data();
    if (form.scaled) args.scale = scale.data();
    if (form.block) args.grad_context = grad_context.data();
    if (form.attention) {
      args.attention = attention.data();
      args.grad_logits = grad_logits.data();
      args.mask_weight = mask_weight.companion();
    }
    if (form.of_batch) {
      args.y = y.buffer().data();
      args.grad_weight = weight_sum.data();
      args.grad_bias = bias_sum.data();
    } else if (form.gradients) {
      args.beside = gradients;
      for (std::size_t c = 0; c < channels(); ++c) weight_sum[c] = bias_sum[c] = 0;
    }
    args.grad_y = grad_y.buffer().data();
    run_launch(plan, schedule, [&] { return launch_grad_y(plan, args, nullptr); });
    if (form.gradients) check_bits(bits);
    require_passes(grad.buffer(), 1, 0);
    require_passes(y.buffer(), form.of_batch, 0);
    require_passes(grad_y.buffer(), 0, 1);
    bits.check(grad_y.buffer());
  }

  void check() const {
    const auto [images, channels, pixels] = on.shape;
    const double roundoff = Element<A>::roundoff, count = static_cast<double>(images) * pixels;
    if (form.gradients) check_gradients();
    for (int n = 0; n < images; ++n) {
      for (int c = 0; c < channels; ++c) {
        const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
        for (int s = 0; s < pixels; ++s) {
          const std::size_t ns = static_cast<std::size_t>(n) * pixels + s;
          double want = 0, size = 0;
          const auto add = [&](double part) {
            want += slope(c) * part;
            size += std::abs(slope(c) * part);
          };
          add(grad(n, c, s) * scale_of(nc));
          if (form.attention) {
            add(attention[ns] * grad_context_of(nc));
            add(grad_logits[ns] * mask_weight[c]);
          } else {
            add(grad_context_of(nc) / pixels);
          }
          if (form.of_batch) {
            add(-bias_sum[c] / count);
            add(-(y(n, c, s) - mean[c]) * inverse_std[c] * weight_sum[c] / count);
          }
          host::require_close("grad_y", grad_y(n, c, s), want, store_error<T>(want) + 10 * roundoff * size);
        }
      }
    }
  }

  void check_gradients() const {
    const auto [images, channels, pixels] = on.shape;
    const double error = sum_error<T>(images);
    for (int c = 0; c < channels; ++c) {
      double of_weight = 0, weight_size = 0, of_bias = 0, bias_size = 0;
      const auto add_weight = [&](double part) {
        of_weight += part * inverse_std[c];
        weight_size += std::abs(part * inverse_std[c]);
      };
      for (int n = 0; n < images; ++n) {
        const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
        const double of_context = grad_context_of(nc);
        of_bias += scale_of(nc) * sums[nc] + of_context;
        bias_size += std::abs(scale_of(nc) * sums[nc]) + std::abs(of_context);
        add_weight(scale_of(nc) * product_sums[nc]);
        add_weight(of_context * state[nc + 2 * (n + 1)]);
      }
      if (form.attention) {
        const double of_mask = slope(c) * grad_folded[c];
        add_weight(mask_weight[c] * grad_folded[c]);
        host::require_close("grad_mask_weight", grad_mask_weight[c], of_mask,
                            grad_mask_weight.store_error(of_mask) + 4 * Element<A>::roundoff * std::abs(of_mask));
      }
      host::require_close("weight_sum", weight_sum[c], of_weight, store_error<A>(of_weight) + error * weight_size);
      host::require_close("bias_sum", bias_sum[c], of_bias, store_error<A>(of_bias) + error * bias_size);
      host::require_close("grad_weight", grad_weight[c], weight_sum[c], grad_weight.store_error(weight_sum[c]));
      host::require_close("grad_bias", grad_bias[c], bias_sum[c], grad_bias.store_error(bias_sum[c]));
    }
  }
};

// Of many images, the sums have short chains of additions.
void run_many_images(const host::Schedule& schedule) {
  const ShapeCase on{{4096, 8, 1}, 4, false, 0, ""};
  Last<float> last(kForms[5], on, Layout::kNCHW, true);
  for (std::size_t i = 0; i < last.sums.size(); ++i) last.sums[i] = last.product_sums[i] = 1.0f / 3;
  SameBits bits;
  last.run(schedule, bits);
  LargestError weight_error, bias_error;
  for (std::size_t c = 0; c < last.channels(); ++c) {
    const double sum = 4096 * static_cast<double>(1.0f / 3);
    weight_error.add(last.weight_sum[c], sum * last.inverse_std[c]);
    bias_error.add(last.bias_sum[c], sum);
  }
  weight_error.require("weight_sum", 2);
  bias_error.require("bias_sum", 2);
}

// The mean far larger than the deviation.
void run_far_from_zero(Layout layout, const host::Schedule& schedule) {
  const ShapeCase on{{2, 16, 300}, 4, false, 0, ""};
  Last<float> last(kForms[5], on, layout, true);
  const Pattern y(1, 10), grad(2, 20);
  const auto [images, channels, pixels] = on.shape;
  const auto index = [&](int n, int c, int s) {
    return (static_cast<std::size_t>(n) * on.shape.channels + c) * on.shape.pixels + s;
  };
  for (int n = 0; n < images; ++n) {
    for (int c = 0; c < channels; ++c) {
      last.mean.set(c, 1000);
      const std::size_t nc = static_cast<std::size_t>(n) * channels + c;
      last.sums[nc] = 0;
      last.product_sums[nc] = 300;
      for (int s = 0; s < pixels; ++s) {
        last.y.set(n, c, s, y(index(n, c, s)) + 1000);
        last.grad.set(n, c, s, grad(index(n, c, s)));
      }
    }
  }
  SameBits bits;
  last.run(schedule, bits);
  LargestError error;
  for (int n = 0; n < images; ++n) {
    for (int c = 0; c < channels; ++c) {
      const double curve = last.inverse_std[c] * last.weight_sum[c] / (images * pixels);
      for (int s = 0; s < pixels; ++s) {
        const double want = last.slope(c) * (grad(index(n, c, s)) - curve * y(index(n, c, s)));
        error.add(last.grad_y(n, c, s), want);
      }
    }
  }
  error.require("grad_y", 2);
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;  // small vectors in the element's type and in the accumulation type take turns
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        wide = !wide;
        for (const Form& form : kForms) {
          wide = !wide;
          const std::string name = std::string(form.name) + "-" + Element<T>::name + "-" + gc::name_of(layout) + "-" +
                                   on.shape.to_string() + (on.misaligned ? "+" + std::to_string(on.misaligned) : "");
          auto bits = std::make_shared<SameBits>();
          list.push_back({name, on.reason, [=, wide = wide](const host::Schedule& schedule) {
                            Last<T> last(form, on, layout, wide);
                            last.run(schedule, *bits);
                            last.check();
                          }});
        }
      });
    }
  }
  list.push_back(accuracy_case("many_images", "additions of equal parts all err to one side",
                               [](const host::Schedule& schedule) { run_many_images(schedule); }));
  for (const Layout layout : kLayouts) {
    list.push_back(accuracy_case(std::string("far_from_zero-") + gc::name_of(layout), "the mean of y is in no product",
                                 [=](const host::Schedule& schedule) { run_far_from_zero(layout, schedule); }));
  }
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
