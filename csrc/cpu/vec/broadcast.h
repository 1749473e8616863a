// out = x * scale + term with a scale and a term per image and channel, and its backward pass: grad_x = grad * scale,
// grad_scale = sum_s grad * x, grad_term = sum_s grad. Both stream: every element is read once and written once.
#pragma once

#include "cpu/vec/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

template <bool kScale, bool kTerm, bool kStream, typename T>
inline void broadcast_elements(const BroadcastArgs<T>& args, int64_t element_begin, int64_t element_end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const Shape& shape = args.shape;
  const int64_t width = shape.channels_last ? shape.channels : shape.pixels;
  L scale = L::zero();
  L term = L::zero();
  int64_t row = element_begin / width;
  int64_t column = element_begin % width;
  for (int64_t left = element_end - element_begin; left > 0; ++row, column = 0) {
    const int64_t end = std::min(width, column + left);
    left -= end - column;
    const T* x = args.x + row * width;
    T* out = args.out + row * width;
    const auto write_row = [&](const auto& fetch) {
      const auto write_run = [&](int64_t j, int count, auto partial) {
        fetch(j, count, partial);
        L lanes = L::template load<partial.value>(x + j, count);
        GC_UNROLL
        for (int i = 0; i < L::kVecs; ++i) {
          if constexpr (kScale && kTerm) {
            lanes.v[i] = at::vec::fmadd(lanes.v[i], scale.v[i], term.v[i]);
          } else if constexpr (kScale) {
            lanes.v[i] = lanes.v[i] * scale.v[i];
          } else {
            lanes.v[i] = lanes.v[i] + term.v[i];
          }
        }
        lanes.template store<partial.value, kStream>(out + j, count);
      };
      const int64_t head = kStream ? until_aligned(out + column, end - column) : 0;
      if (head > 0) write_run(column, static_cast<int>(head), std::true_type{});
      column += head;
      for_each_run<L::kWidth>(column, end, write_run);
    };
    if (shape.channels_last) {
      const int64_t first = row / shape.pixels * shape.channels;
      write_row([&](int64_t j, int count, auto partial) {
        if constexpr (kScale) scale = L::template load_wide<partial.value>(args.scale + first + j, count);
        if constexpr (kTerm) term = L::template load_wide<partial.value>(args.term + first + j, count);
      });
    } else {
      GC_UNROLL
      for (int i = 0; i < L::kVecs; ++i) {
        if constexpr (kScale) scale.v[i] = V(args.scale[row]);
        if constexpr (kTerm) term.v[i] = V(args.term[row]);
      }
      write_row([](int64_t, int, auto) {});
    }
  }
}

template <bool kScale, bool kTerm, typename T>
inline void broadcast_range(const BroadcastArgs<T>& args, int64_t element_begin, int64_t element_end) {
  if (args.stream) {
    broadcast_elements<kScale, kTerm, true>(args, element_begin, element_end);
    stream_fence();
  } else {
    broadcast_elements<kScale, kTerm, false>(args, element_begin, element_end);
  }
}

template <typename T>
void broadcast(const BroadcastArgs<T>& args, int64_t element_begin, int64_t element_end) {
  if (args.scale && args.term) {
    broadcast_range<true, true>(args, element_begin, element_end);
  } else if (args.scale) {
    broadcast_range<true, false>(args, element_begin, element_end);
  } else {
    broadcast_range<false, true>(args, element_begin, element_end);
  }
}

// Which results of the backward pass are wanted.
template <bool kGradX_, bool kGradScale_, bool kGradTerm_>
struct Wanted {
  static constexpr bool kGradX = kGradX_;
  static constexpr bool kGradScale = kGradScale_;
  static constexpr bool kGradTerm = kGradTerm_;
};

// One run: writes grad * scale, adds grad * x and grad to the sums.
template <typename Want, bool kPartial, typename T>
inline void backward_run(const BroadcastBackwardArgs<T>& args, int64_t j, const Lanes<T>& scale, int count,
                         Lanes<T>& grad_scale, Lanes<T>& grad_term) {
  using L = Lanes<T>;
  L g = L::template load<kPartial>(args.grad + j, count);
  if constexpr (Want::kGradScale) grad_scale.add_product(g, L::template load<kPartial>(args.x + j, count));
  if constexpr (Want::kGradTerm) grad_term.add(g);
  if constexpr (Want::kGradX) {
    GC_UNROLL
    for (int i = 0; i < L::kVecs; ++i) g.v[i] = g.v[i] * scale.v[i];
    g.template store<kPartial>(args.grad_x + j, count);
  }
}

// NCHW: rows are channels. The pixels [begin, end) of kRows planes; the sums of their lanes are wanted.
template <typename Want, int kRows, typename T>
inline void backward_rows(const BroadcastBackwardArgs<T>& args, int64_t plane, int64_t begin, int64_t end,
                          Vec<acc_t<T>>* scale_sums, Vec<acc_t<T>>* term_sums) {
  using L = Lanes<T>;
  using V = typename L::V;
  const int64_t pixels = args.shape.pixels;
  L scale[kRows], by_x[kRows], plain[kRows];
  GC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    by_x[r] = plain[r] = L::zero();
    GC_UNROLL
    for (int i = 0; i < L::kVecs; ++i) scale[r].v[i] = V(Want::kGradX ? args.scale[plane + r] : acc_t<T>(0));
  }
  for_each_run<L::kWidth>(plane * pixels + begin, plane * pixels + end, [&](int64_t j, int count, auto partial) {
    GC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      backward_run<Want, partial.value>(args, j + r * pixels, scale[r], count, by_x[r], plain[r]);
    }
  });
  GC_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GC_UNROLL
    for (int i = 1; i < L::kVecs; ++i) {
      by_x[r].v[0] = by_x[r].v[0] + by_x[r].v[i];
      plain[r].v[0] = plain[r].v[0] + plain[r].v[i];
    }
    scale_sums[r] = by_x[r].v[0];
    term_sums[r] = plain[r].v[0];
  }
}

// sums[c] += ... over one image's pixels [begin, end). Several planes are read side by side: one sum after the other
// would wait for every addition.
template <typename Want, typename T>
inline void backward_planes(const BroadcastBackwardArgs<T>& args, int64_t image, int64_t begin, int64_t end,
                            acc_t<T>* grad_scale, acc_t<T>* grad_term) {
  using V = Vec<acc_t<T>>;
  constexpr int kGroup = V::size();
  constexpr int kTogether = kGroup < 4 ? kGroup : 4;
  const Shape& shape = args.shape;
  for_each_run<kGroup>(0, shape.channels, [&](int64_t channel, int rows, auto) {
    V scale_sums[kGroup];
    V term_sums[kGroup];
    const int64_t plane = image * shape.channels + channel;
    int r = 0;
    for (; r + kTogether <= rows; r += kTogether) {
      backward_rows<Want, kTogether>(args, plane + r, begin, end, scale_sums + r, term_sums + r);
    }
    for (; r < rows; ++r) backward_rows<Want, 1>(args, plane + r, begin, end, scale_sums + r, term_sums + r);
    for (; r < kGroup; ++r) scale_sums[r] = term_sums[r] = V(acc_t<T>(0));
    if constexpr (Want::kGradScale) {
      (V::loadu(grad_scale + channel, rows) + lane_sums(scale_sums)).store(grad_scale + channel, rows);
    }
    if constexpr (Want::kGradTerm) {
      (V::loadu(grad_term + channel, rows) + lane_sums(term_sums)).store(grad_term + channel, rows);
    }
  });
}

// channels_last: rows are pixels, and all of [begin, end) are taken for one block of channels before the next.
template <typename Want, typename T>
inline void backward_pixels(const BroadcastBackwardArgs<T>& args, int64_t image, int64_t begin, int64_t end,
                            acc_t<T>* grad_scale, acc_t<T>* grad_term) {
  using L = Lanes<T>;
  constexpr int kBlock = 4 / L::kVecs;  // runs: twice as many sums, and the scales, stay in registers
  const int64_t channels = args.shape.channels;
  const int64_t base = (image * args.shape.pixels + begin) * channels;
  const auto take_block = [&](int64_t channel, int last, auto runs, auto partial) {
    constexpr int kRuns = runs.value;
    const auto for_runs = [&](const auto& body) {
      GC_UNROLL
      for (int b = 0; b < kRuns - 1; ++b) body(b, L::kWidth, std::false_type{});
      body(kRuns - 1, last, partial);
    };
    L scale[kRuns], by_x[kRuns], plain[kRuns];
    for_runs([&](int b, int count, auto part) {
      if constexpr (Want::kGradX) {
        const acc_t<T>* scales = args.scale + image * channels + channel;
        scale[b] = L::template load_wide<part.value>(scales + b * L::kWidth, count);
      }
      by_x[b] = L::zero();
      plain[b] = L::zero();
    });
    for (int64_t j = base + channel, rows = end - begin; rows > 0; --rows, j += channels) {
      for_runs([&](int b, int count, auto part) {
        backward_run<Want, part.value>(args, j + b * L::kWidth, scale[b], count, by_x[b], plain[b]);
      });
    }
    for_runs([&](int b, int count, auto) {
      if constexpr (Want::kGradScale) by_x[b].add_to(grad_scale + channel + b * L::kWidth, count);
      if constexpr (Want::kGradTerm) plain[b].add_to(grad_term + channel + b * L::kWidth, count);
    });
  };
  int64_t channel = 0;
  for (; channel + kBlock * L::kWidth <= channels; channel += kBlock * L::kWidth) {
    take_block(channel, L::kWidth, std::integral_constant<int, kBlock>{}, std::false_type{});
  }
  for_each_run<L::kWidth>(channel, channels, [&](int64_t c, int count, auto partial) {
    take_block(c, count, std::integral_constant<int, 1>{}, partial);
  });
}

template <typename Want, typename T>
inline void backward_units(const BroadcastBackwardArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  const Shape& shape = args.shape;
  const Plan& plan = args.plan;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t image = unit / plan.splits;
    const int64_t split = unit % plan.splits;
    acc_t<T>* grad_scale = Want::kGradScale ? args.grad_scale + unit * shape.channels : nullptr;
    acc_t<T>* grad_term = Want::kGradTerm ? args.grad_term + unit * shape.channels : nullptr;
    for (int64_t c = 0; c < shape.channels; ++c) {
      if constexpr (Want::kGradScale) grad_scale[c] = 0;
      if constexpr (Want::kGradTerm) grad_term[c] = 0;
    }
    const int64_t split_end = std::min(plan.split_begin(split + 1), shape.pixels);
    // Nothing is read twice, so an NCHW step need not fit any cache; it ends where its sums would grow too long.
    const int64_t step = shape.channels_last ? std::min(plan.tile, kChain) : kMaxTilePixels;
    for (int64_t pixel = plan.split_begin(split); pixel < split_end; pixel += step) {
      const int64_t end = std::min(pixel + step, split_end);
      if (shape.channels_last) {
        backward_pixels<Want>(args, image, pixel, end, grad_scale, grad_term);
      } else {
        backward_planes<Want>(args, image, pixel, end, grad_scale, grad_term);
      }
    }
  }
}

template <typename T>
void broadcast_backward(const BroadcastBackwardArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  if (args.grad_x) {
    backward_units<Wanted<true, true, true>>(args, unit_begin, unit_end);
  } else if (args.grad_scale && args.grad_term) {
    backward_units<Wanted<false, true, true>>(args, unit_begin, unit_end);
  } else if (args.grad_scale) {
    backward_units<Wanted<false, true, false>>(args, unit_begin, unit_end);
  } else {
    backward_units<Wanted<false, false, true>>(args, unit_begin, unit_end);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
