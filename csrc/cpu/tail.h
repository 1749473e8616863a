// The passes of the residual tail (csrc/ops/tail.h) that it has alone, and the small steps between them.
#pragma once

#include <cmath>

#include "cpu/contexts.h"
#include "cpu/maps.h"
#include "cpu/norm.h"
#include "cpu/run.h"
#include "cpu/statistics.h"

namespace gc::cpu {

template <typename T>
struct ResidualMemory {
  using A = acc_t<T>;
  NormMemory<T> norm;
  A *slope, *shift;  // [N, C]

  ResidualMemory(const FeatureMap& y, Scratch<A>& scratch) : norm(y, scratch) {
    slope = scratch.take(y.images() * y.channels());
    shift = scratch.take(y.images() * y.channels());
  }
};

class Residual {
 public:
  Residual(const FeatureMap& y, const void* /*identity*/, const void* /*out*/) : y_(y) {}
  Wanted wanted() const { return wanted_by<ResidualMemory>(y_); }
  void launch(const ResidualCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const int64_t images = y_.images(), channels = y_.channels();
      const NormVectors<T> norm(call.norm, channels, memory.norm);
      const A* const scale = static_cast<const A*>(call.scale);
      const A* const term = static_cast<const A*>(call.term);
      ResidualArgs<T> args{};
      args.shape = shape_of(y_);
      args.y = static_cast<const T*>(y_.data());
      args.identity = static_cast<const T*>(call.identity);
      args.mean = norm.mean;
      args.slope = times(scale, norm.slope, images, channels, memory.slope);
      args.shift = times(scale, norm.bias, images, channels, memory.shift);
      for (int64_t i = 0; term != nullptr && i < images * channels; ++i) memory.shift[i] += term[i];
      args.out = static_cast<T*>(call.out);
      args.relu = call.relu;
      args.stream = past_caches(y_);
      run(args);
    };
    with_memory<ResidualMemory>(lent, body, y_);
  }

 private:
  const FeatureMap& y_;
};

template <typename T>
struct ResidualSumsMemory {
  using A = acc_t<T>;
  A *mean, *sums, *product_sums;  // of each plane; partial sums

  ResidualSumsMemory(const FeatureMap& y, bool products, const Shape& shape, const Plan& plan, Scratch<A>& scratch) {
    const int64_t partials = plan.splits > 1 ? shape.images * plan.splits * shape.channels : 0;
    mean = scratch.take(products ? y.images() * y.channels() : 0);
    sums = scratch.take(partials);
    product_sums = scratch.take(products ? partials : 0);
  }
};

class ResidualSums {
 public:
  ResidualSums(const FeatureMap& y, bool products, const void*, const void*, const void*)
      : y_(y), products_(products), shape_(streaming(shape_of(y))), plan_(plan_for(y, shape_)) {}
  Wanted wanted() const { return wanted_by<ResidualSumsMemory>(y_, products_, shape_, plan_); }
  void launch(const ResidualSumsCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const bool merges = plan_.splits > 1;
      ResidualSumsArgs<T> args{};
      args.shape = shape_;
      args.plan = plan_;
      args.grad = static_cast<const T*>(call.grad);
      args.out = static_cast<const T*>(call.out);
      args.grad_in = static_cast<T*>(call.grad_in);
      args.sums = merges ? memory.sums : static_cast<A*>(call.sums);
      args.stream = past_caches(y_);
      if (products_) {
        args.y = static_cast<const T*>(y_.data());
        args.mean = static_cast<const A*>(call.norm.mean);
        if (shape_.images != y_.images()) {
          args.mean = for_each_image(args.mean, y_.images(), y_.channels(), memory.mean);
          args.mean_stride = shape_.channels;
        }
        args.product_sums = merges ? memory.product_sums : static_cast<A*>(call.product_sums);
      }
      run(args);
      if (!merges) return;
      const auto merge = [&](const A* partials, void* sums) {
        add_members<T>(partials, static_cast<A*>(sums), shape_.images, plan_.splits, shape_.channels);
      };
      merge(args.sums, call.sums);
      if (products_) merge(args.product_sums, call.product_sums);
    };
    with_memory<ResidualSumsMemory>(lent, body, y_, products_, shape_, plan_);
  }

 private:
  const FeatureMap& y_;
  bool products_;
  Shape shape_;  // planes are taken in small groups
  Plan plan_;
};

// of_bias   = sum_n (scale sums + grad_context)
// of_weight = sum_n (scale product_sums + grad_context context) inverse_std + mask_weight inverse_std grad_folded
// of mask_weight = slope grad_folded, where grad_folded is that of slope * mask_weight
inline void norm_gradients(const FeatureMap& y, const NormGradientsCall& call) {
  with_norm(y, call.norm, [&](auto zero, const auto& vectors) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t channels = y.channels(), row = channels + kStatistics;
    const auto at = [](const void* array, int64_t i, double absent) {
      return array ? static_cast<double>(static_cast<const A*>(array)[i]) : absent;
    };
    const Tensor copies = y.empty_accumulation({2 * channels});
    A* const mask_copy = copies.data_ptr<A>();
    A* const result = mask_copy + channels;
    const A* const mask = widen<T>(call.mask_weight, channels, mask_copy);
    for (int64_t c = 0; c < channels; ++c) {
      double of_bias = 0, of_weight = 0;
      for (int64_t n = 0; n < y.images(); ++n) {
        const int64_t i = n * channels + c;
        const double scale = at(call.scale, i, 1), grad_context = at(call.grad_context, i, 0);
        of_bias += scale * at(call.sums, i, 0) + grad_context;
        of_weight += scale * at(call.product_sums, i, 0);
        if (call.grad_context) of_weight += grad_context * at(call.state, n * row + kStatistics + c, 0);
      }
      if (call.grad_folded) of_weight += mask[c] * at(call.grad_folded, c, 0);
      static_cast<A*>(call.grad_bias_sum)[c] = static_cast<A>(of_bias);
      static_cast<A*>(call.grad_weight_sum)[c] = static_cast<A>(of_weight * vectors.inverse_std[c]);
    }
    const auto put = [&](const A* sum, CompanionOut grad) {
      if (grad.data == nullptr) return;
      std::copy_n(sum, channels, computed_in<T>(grad, result));
      narrow<T>(result, grad, channels);
    };
    put(static_cast<const A*>(call.grad_weight_sum), call.grad_weight);
    put(static_cast<const A*>(call.grad_bias_sum), call.grad_bias);
    if (call.grad_mask_weight.data == nullptr) return;
    A* const of_mask = computed_in<T>(call.grad_mask_weight, result);
    for (int64_t c = 0; c < channels; ++c) {
      of_mask[c] = static_cast<const A*>(call.grad_folded)[c] * vectors.slope[c];
    }
    narrow<T>(of_mask, call.grad_mask_weight, channels);
  });
}

template <typename T>
struct GradYMemory {
  using A = acc_t<T>;
  NormMemory<T> norm;
  A *scale, *term, *grad_context;   // [N, C]
  A *curve, *folded, *mask_weight;  // [C]; mask_weight: a copy

  GradYMemory(const FeatureMap& y, Scratch<A>& scratch) : norm(y, scratch) {
    for (A** const place : {&scale, &term, &grad_context}) *place = scratch.take(y.images() * y.channels());
    for (A** const place : {&curve, &folded, &mask_weight}) *place = scratch.take(y.channels());
  }
};

class GradY {
 public:
  GradY(const FeatureMap& y, bool attention, bool of_batch, const void*, const void*)
      : y_(y), attention_(attention), of_batch_(of_batch) {}
  Wanted wanted() const { return wanted_by<GradYMemory>(y_); }
  void launch(const GradYCall& call, Lent lent) const {
    if (call.of_norm != nullptr) norm_gradients(y_, *call.of_norm);
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const int64_t images = y_.images(), channels = y_.channels();
      const NormVectors<T> norm(call.norm, channels, memory.norm);
      const A* const grad_context = static_cast<const A*>(call.grad_context);
      GradYArgs<T> args{};
      args.shape = shape_of(y_);
      args.grad = static_cast<const T*>(call.grad);
      args.y = static_cast<const T*>(y_.data());
      args.mean = norm.mean;
      args.scale = times(static_cast<const A*>(call.scale), norm.slope, images, channels, memory.scale);
      args.grad_y = static_cast<T*>(call.grad_y);
      args.stream = past_caches(y_);
      if (attention_) {
        args.attention = static_cast<const A*>(call.attention);
        args.grad_logits = static_cast<const A*>(call.grad_logits);
        args.grad_context = times(grad_context, norm.slope, images, channels, memory.grad_context);
        const A* const weight = widen<T>(call.mask_weight, channels, memory.mask_weight);
        args.mask_weight = times(weight, norm.slope, 1, channels, memory.folded);
      }
      const bool has_term = of_batch_ || (grad_context != nullptr && !attention_);
      if (has_term) args.term = term(call, norm, memory.term);
      if (of_batch_) {
        const double count = static_cast<double>(images * y_.pixels());
        for (int64_t c = 0; c < channels; ++c) {
          const double curve = static_cast<const A*>(call.grad_weight)[c] / count;
          memory.curve[c] = static_cast<A>(-curve * norm.slope[c] * norm.inverse_std[c]);
        }
        args.curve = memory.curve;
        run(args);
      } else if (attention_) {
        run(without_statistics(args));
      } else {
        BroadcastArgs<T> broadcast{args.shape, args.grad, args.scale, args.term, args.grad_y, args.stream};
        run(broadcast);
      }
    };
    with_memory<GradYMemory>(lent, body, y_);
  }

 private:
  // What all pixels of an image get: from the mean over them, and from the mean of the batch.
  template <typename T>
  const acc_t<T>* term(const GradYCall& call, const NormVectors<T>& norm, acc_t<T>* term) const {
    using A = acc_t<T>;
    const A* const grad_context = attention_ ? nullptr : static_cast<const A*>(call.grad_context);
    const A* const grad_bias = static_cast<const A*>(call.grad_bias);
    const double pixels = static_cast<double>(y_.pixels()), count = pixels * static_cast<double>(y_.images());
    for (int64_t n = 0; n < y_.images(); ++n) {
      for (int64_t c = 0; c < y_.channels(); ++c) {
        double sum = grad_context ? grad_context[n * y_.channels() + c] / pixels : 0;
        if (of_batch_) sum -= grad_bias[c] / count;
        term[n * y_.channels() + c] = static_cast<A>(sum * norm.slope[c]);
      }
    }
    return term;
  }

  template <typename T>
  static GradXArgs<T> without_statistics(const GradYArgs<T>& args) {
    GradXArgs<T> of_x{};
    of_x.shape = args.shape;
    of_x.grad = args.grad;
    of_x.scale = args.scale;
    of_x.attention = args.attention;
    of_x.grad_context = args.grad_context;
    of_x.grad_logits = args.grad_logits;
    of_x.mask_weight = args.mask_weight;
    of_x.grad_x = args.grad_y;
    of_x.stream = args.stream;
    return of_x;
  }

  const FeatureMap& y_;
  bool attention_, of_batch_;
};

}  // namespace gc::cpu
