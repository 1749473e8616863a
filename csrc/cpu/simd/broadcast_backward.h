// The backward pass of out[c, s] = x[c, s] * scale[c] + term[c]:
//
//   grad_x[c, s]  = grad[c, s] * scale[c]
//   grad_scale[c] = sum_s grad[c, s] * x[c, s]
//   grad_term[c]  = sum_s grad[c, s]
//
// Every element of grad and x is read once and every element of grad_x is written once.
#pragma once

#include "cpu/simd/cascade.h"
#include "cpu/simd/tile.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

// Which of the results are wanted.
template <bool kGradX_, bool kGradScale_, bool kGradTerm_>
struct Wanted {
  static constexpr bool kGradX = kGradX_;
  static constexpr bool kGradScale = kGradScale_;
  static constexpr bool kGradTerm = kGradTerm_;
};

// Takes one vector: writes grad * scale, and adds grad * x and grad to the sums.
template <typename Want, bool kPartial, typename T>
inline void backward_vector(const BroadcastBackwardArgs<T>& args, int64_t j, const Lanes<T>& scale, int count,
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

// to[r] += the sum of all lanes of sums[r]
template <int kRows, typename T>
GC_INLINE void add_lane_sums(const Lanes<T> (&sums)[kRows], acc_t<T>* to) {
  using V = typename Lanes<T>::V;
  V rows[kRows];
  GC_UNROLL_SUMS
  for (int r = 0; r < kRows; ++r) rows[r] = sums[r].sum();
  (V::loadu(to, kRows) + lane_sums(rows)).store(to, kRows);
}

// NCHW: adds the sums over the pixels [begin, end) of kRows planes, r being one of them, to grad_scale[r] and
// grad_term[r].
template <typename Want, int kRows, typename T>
GC_FLATTEN void backward_rows(const BroadcastBackwardArgs<T>& args, int64_t plane, int64_t begin, int64_t end,
                              acc_t<T>* grad_scale, acc_t<T>* grad_term) {
  using L = Lanes<T>;
  const int64_t pixels = args.shape.pixels;
  // A result that is not wanted takes one vector, which is not used.
  constexpr int kScales = Want::kGradX ? kRows : 1;
  constexpr int kByX = Want::kGradScale ? kRows : 1;
  constexpr int kPlain = Want::kGradTerm ? kRows : 1;
  L scale[kScales], by_x[kByX], plain[kPlain];
  GC_UNROLL_SUMS
  for (int r = 0; r < kRows; ++r) {
    by_x[r % kByX] = plain[r % kPlain] = L::zero();
    scale[r % kScales] = L::all(Want::kGradX ? args.scale[plane + r] : acc_t<T>(0));
  }
  for_each_vector<L::kWidth>(plane * pixels + begin, plane * pixels + end, [&](int64_t j, int count, auto partial) {
    GC_UNROLL_SUMS
    for (int r = 0; r < kRows; ++r) {
      backward_vector<Want, partial.value>(args, j + r * pixels, scale[r % kScales], count, by_x[r % kByX],
                                           plain[r % kPlain]);
    }
  });
  if constexpr (Want::kGradScale) add_lane_sums(by_x, grad_scale);
  if constexpr (Want::kGradTerm) add_lane_sums(plain, grad_term);
}

// NCHW: adds the sums over an image's pixels [begin, end) to grad_scale and grad_term. Several planes are read side by
// side: a single sum would wait for every addition.
template <typename Want, typename T>
inline void backward_planes(const BroadcastBackwardArgs<T>& args, int64_t image, int64_t begin, int64_t end,
                            acc_t<T>* grad_scale, acc_t<T>* grad_term) {
  constexpr bool kOneResult = Want::kGradX + Want::kGradScale + Want::kGradTerm == 1;
  constexpr int64_t kAhead = kAheadBytes / sizeof(T);
  const int64_t pixels = args.shape.pixels;
  for_each_group<kOneResult ? kRowsTogether<T> : std::min(4, kRowsTogether<T>)>(
      0, args.shape.channels, [&](int64_t channel, auto rows) {
        const int64_t plane = image * args.shape.channels + channel;
        // The hardware's prefetching does not see through the pattern that several short rows side by side make.
        if (end - begin == pixels) {
          const int64_t next = plane * pixels + kAhead;
          prefetch_row(args.grad + next, rows * pixels);
          if constexpr (Want::kGradScale) prefetch_row(args.x + next, rows * pixels);
        }
        backward_rows<Want, rows>(args, plane, begin, end, grad_scale + channel, grad_term + channel);
      });
}

// channels_last: the same. A few pixels are added up before their sum goes to the sums in memory, vector by vector, so
// that x is read as it lies. Calls added() whenever each of the sums in memory has had such a term.
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
    for_each_vector<L::kWidth>(0, channels, [&](int64_t c, int count, auto partial) {
      L scale = L::zero();
      if constexpr (Want::kGradX) scale = L::template load_wide<partial.value>(scales + c, count);
      L by_x = L::zero();
      L plain = L::zero();
      GC_UNROLL_SUMS
      for (int r = 0; r < kRows; ++r) {
        const int64_t j = base + r * channels + c;
        __builtin_prefetch(args.grad + j + kAhead);
        if constexpr (Want::kGradScale) __builtin_prefetch(args.x + j + kAhead);
        backward_vector<Want, partial.value>(args, j, scale, count, by_x, plain);
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
inline void backward_splits(const BroadcastBackwardArgs<T>& args, int64_t split_begin, int64_t split_end) {
  const Shape& shape = args.shape;
  Sums<acc_t<T>> scale_sums(shape.channels), term_sums(shape.channels);
  for (int64_t split = split_begin; split < split_end; ++split) {
    const auto [image, begin, end] = split_at(shape, args.plan, split);
    acc_t<T>* grad_scale = Want::kGradScale ? args.grad_scale + split * shape.channels : nullptr;
    acc_t<T>* grad_term = Want::kGradTerm ? args.grad_term + split * shape.channels : nullptr;
    if constexpr (Want::kGradScale) scale_sums.start(grad_scale);
    if constexpr (Want::kGradTerm) term_sums.start(grad_term);
    const auto added = [&] {
      if constexpr (Want::kGradScale) scale_sums.added();
      if constexpr (Want::kGradTerm) term_sums.added();
    };
    if (shape.channels_last) {
      backward_pixels<Want>(args, image, begin, end, grad_scale, grad_term, added);
    } else {
      // Nothing is read twice, so what is taken at once need not fit any cache; more would make its sums too long.
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
void broadcast_backward(const BroadcastBackwardArgs<T>& args, int64_t split_begin, int64_t split_end) {
  if (args.grad_x) {
    backward_splits<Wanted<true, true, true>>(args, split_begin, split_end);
  } else if (args.grad_scale && args.grad_term) {
    backward_splits<Wanted<false, true, true>>(args, split_begin, split_end);
  } else if (args.grad_scale) {
    backward_splits<Wanted<false, true, false>>(args, split_begin, split_end);
  } else {
    backward_splits<Wanted<false, false, true>>(args, split_begin, split_end);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
