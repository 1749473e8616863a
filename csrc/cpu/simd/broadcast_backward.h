// The backward pass of out = x * scale + term: grad_x = grad * scale, grad_scale = sum_s grad * x, grad_term = sum_s
// grad. Every element is read once, and of grad_x written once.
#pragma once

#include "cpu/simd/cascade.h"
#include "cpu/simd/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

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
    GC_UNROLL_SUMS
    for (int i = 0; i < L::kVecs; ++i) g.v[i] = g.v[i] * scale.v[i];
    g.template store<kPartial>(args.grad_x + j, count);
  }
}

// to[r] += the sum of the lanes of sums[r]
template <int kRows, typename T>
GC_INLINE void add_lane_sums(const Lanes<T> (&sums)[kRows], acc_t<T>* to) {
  using V = typename Lanes<T>::V;
  V rows[kRows];
  GC_UNROLL_SUMS
  for (int r = 0; r < kRows; ++r) rows[r] = sums[r].sum();
  (V::loadu(to, kRows) + lane_sums(rows)).store(to, kRows);
}

// NCHW: rows are channels. The pixels [begin, end) of kRows planes: grad_scale[r] and grad_term[r] += their sums.
template <typename Want, int kRows, typename T>
GC_FLATTEN void backward_rows(const BroadcastBackwardArgs<T>& args, int64_t plane, int64_t begin, int64_t end,
                              acc_t<T>* grad_scale, acc_t<T>* grad_term) {
  using L = Lanes<T>;
  const int64_t pixels = args.shape.pixels;
  // What is not wanted is one unused vector.
  constexpr int kScales = Want::kGradX ? kRows : 1;
  constexpr int kByX = Want::kGradScale ? kRows : 1;
  constexpr int kPlain = Want::kGradTerm ? kRows : 1;
  L scale[kScales], by_x[kByX], plain[kPlain];
  GC_UNROLL_SUMS
  for (int r = 0; r < kRows; ++r) {
    by_x[r % kByX] = plain[r % kPlain] = L::zero();
    scale[r % kScales] = L::all(Want::kGradX ? args.scale[plane + r] : acc_t<T>(0));
  }
  for_each_run<L::kWidth>(plane * pixels + begin, plane * pixels + end, [&](int64_t j, int count, auto partial) {
    GC_UNROLL_SUMS
    for (int r = 0; r < kRows; ++r) {
      backward_run<Want, partial.value>(args, j + r * pixels, scale[r % kScales], count, by_x[r % kByX],
                                        plain[r % kPlain]);
    }
  });
  if constexpr (Want::kGradScale) add_lane_sums(by_x, grad_scale);
  if constexpr (Want::kGradTerm) add_lane_sums(plain, grad_term);
}

inline constexpr int64_t kAheadBytes = 12 * 1024;

// sums[c] += ... over one image's pixels [begin, end). Several planes are read side by side: one sum after the other
// would wait for every addition.
template <typename Want, typename T>
inline void backward_planes(const BroadcastBackwardArgs<T>& args, int64_t image, int64_t begin, int64_t end,
                            acc_t<T>* grad_scale, acc_t<T>* grad_term) {
  constexpr bool kOneResult = Want::kGradX + Want::kGradScale + Want::kGradTerm == 1;
  constexpr int64_t kAhead = kAheadBytes / sizeof(T);
  const int64_t pixels = args.shape.pixels;
  for_each_group<kOneResult ? kRowsTogether<T> : std::min(4, kRowsTogether<T>)>(
      0, args.shape.channels, [&](int64_t channel, auto rows) {
        const int64_t plane = image * args.shape.channels + channel;
        // Several short rows side by side are a pattern that the hardware's prefetching does not see through.
        if (end - begin == pixels) {
          const int64_t next = plane * pixels + kAhead;
          prefetch_row(args.grad + next, rows * pixels);
          if constexpr (Want::kGradScale) prefetch_row(args.x + next, rows * pixels);
        }
        backward_rows<Want, rows>(args, plane, begin, end, grad_scale + channel, grad_term + channel);
      });
}

// channels_last: rows are pixels. A few are added up on the way before their sum goes to those in memory, run by run:
// so x is read as it lies. Calls added() whenever each of the sums has had such a term.
template <typename Want, typename T, typename Added>
inline void backward_pixels(const BroadcastBackwardArgs<T>& args, int64_t image, int64_t begin, int64_t end,
                            acc_t<T>* grad_scale, acc_t<T>* grad_term, const Added& added) {
  using L = Lanes<T>;
  constexpr int kTogether = 4;
  const int64_t channels = args.shape.channels;
  const acc_t<T>* scales = Want::kGradX ? args.scale + image * channels : nullptr;
  constexpr int64_t kAhead = kAheadBytes / sizeof(T);
  const auto take_rows = [&](int64_t pixel, auto rows) {
    constexpr int kRows = rows.value;
    const int64_t base = (image * args.shape.pixels + pixel) * channels;
    for_each_run<L::kWidth>(0, channels, [&](int64_t c, int count, auto partial) {
      L scale = L::zero();
      if constexpr (Want::kGradX) scale = L::template load_wide<partial.value>(scales + c, count);
      L by_x = L::zero();
      L plain = L::zero();
      GC_UNROLL_SUMS
      for (int r = 0; r < kRows; ++r) {
        const int64_t j = base + r * channels + c;
        __builtin_prefetch(args.grad + j + kAhead);
        if constexpr (Want::kGradScale) __builtin_prefetch(args.x + j + kAhead);
        backward_run<Want, partial.value>(args, j, scale, count, by_x, plain);
      }
      if constexpr (Want::kGradScale) by_x.add_to(grad_scale + c, count);
      if constexpr (Want::kGradTerm) plain.add_to(grad_term + c, count);
    });
    added();
  };
  int64_t pixel = begin;
  for (; pixel + kTogether <= end; pixel += kTogether) take_rows(pixel, std::integral_constant<int, kTogether>{});
  for (; pixel < end; ++pixel) take_rows(pixel, std::integral_constant<int, 1>{});
}

template <typename Want, typename T>
inline void backward_units(const BroadcastBackwardArgs<T>& args, int64_t unit_begin, int64_t unit_end) {
  const Shape& shape = args.shape;
  const Plan& plan = args.plan;
  Sums<acc_t<T>> scale_sums(shape.channels), term_sums(shape.channels);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t image = unit / plan.splits;
    const int64_t split = unit % plan.splits;
    acc_t<T>* grad_scale = Want::kGradScale ? args.grad_scale + unit * shape.channels : nullptr;
    acc_t<T>* grad_term = Want::kGradTerm ? args.grad_term + unit * shape.channels : nullptr;
    if constexpr (Want::kGradScale) scale_sums.start(grad_scale);
    if constexpr (Want::kGradTerm) term_sums.start(grad_term);
    const auto added = [&] {
      if constexpr (Want::kGradScale) scale_sums.added();
      if constexpr (Want::kGradTerm) term_sums.added();
    };
    const int64_t begin = plan.split_begin(split);
    const int64_t end = std::min(plan.split_begin(split + 1), shape.pixels);
    if (shape.channels_last) {
      backward_pixels<Want>(args, image, begin, end, grad_scale, grad_term, added);
    } else {
      // Nothing is read twice, so a step need not fit any cache; it ends where its sums would grow too long.
      for (int64_t pixel = begin; pixel < end; pixel += kMaxTilePixels) {
        backward_planes<Want>(args, image, pixel, std::min(pixel + kMaxTilePixels, end), grad_scale, grad_term);
        added();
      }
    }
    if constexpr (Want::kGradScale) scale_sums.finish();
    if constexpr (Want::kGradTerm) term_sums.finish();
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
