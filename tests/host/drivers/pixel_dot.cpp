// pixel_dot (csrc/cuda/kernels/pixel_dot.h) against plain loops, on its own: pooling uses it only for very many
// channels.
#include "feature_map.h"
#include "shapes.h"

namespace gc::drivers {
namespace {

// With a vector for each image and no bias, as the backward pass uses it, or one vector and a bias, as the forward
// does.
enum class Form { kPerImage, kShared };

template <typename T>
void run(Form form, const ShapeCase& on, Layout layout, bool wide, SameBits& bits, const host::Schedule& schedule) {
  const auto [images, channels, pixels] = on.shape;
  const bool shared = form == Form::kShared;
  Numbers numbers(4);
  FeatureMap<T> x("x", on.shape, layout, Use::kInput, on.misaligned);
  SmallVector<T> vector("vector", shared ? channels : images * channels, wide, Use::kInput);
  SmallVector<T> bias("bias", 1, wide, Use::kInput);
  Buffer<Acc<T>> dots("dots", static_cast<std::size_t>(images) * pixels, Use::kOutput);
  x.fill(numbers, 2);
  vector.fill(numbers, 1);
  bias.set(0, -1.5);

  const Plan plan = plan_for<T>(KernelKind::kPixelDot, on.shape, layout, on.multiprocessors, false, on.misaligned);
  PixelDotArgs args{};
  args.x = x.buffer().data();
  args.vector = vector.companion();
  args.image_stride = shared ? 0 : channels;
  if (shared) args.bias = bias.companion();
  args.dots = dots.data();
  run_launch(plan, schedule, [&] { return launch_pixel_dot(plan, args, nullptr); });

  for (int n = 0; n < images; ++n) {
    for (int s = 0; s < pixels; ++s) {
      double sum = shared ? bias[0] : 0, size = std::abs(sum);
      for (int c = 0; c < channels; ++c) {
        const double product = vector[(shared ? 0 : n * channels) + c] * x(n, c, s);
        sum += product;
        size += std::abs(product);
      }
      host::require_close("dot", dots[static_cast<std::size_t>(n) * pixels + s], sum,
                          sum_error<T>(channels + 1) * size);
    }
  }
  require_passes(x.buffer(), 1, 0);
  require_passes(dots, 0, 1);
  bits.check(dots);
}

std::vector<host::Case> cases() {
  std::vector<host::Case> list;
  bool wide = false;
  for (const ShapeCase& on : shape_cases()) {
    for (const Layout layout : kLayouts) {
      each_type(on.all_types, [&](auto element) {
        using T = decltype(element);
        for (const Form form : {Form::kPerImage, Form::kShared}) {
          wide = !wide;
          const std::string name = std::string(form == Form::kShared ? "shared" : "per_image") + "-" +
                                   Element<T>::name + "-" + gc::name_of(layout) + "-" + on.shape.to_string() +
                                   (on.misaligned ? "+" + std::to_string(on.misaligned) : "");
          auto bits = std::make_shared<SameBits>();
          list.push_back({name, on.reason, [=, wide = wide](const host::Schedule& schedule) {
                            run<T>(form, on, layout, wide, *bits, schedule);
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
