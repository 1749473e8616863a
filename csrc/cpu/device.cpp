// The CPU (csrc/backend.h): passes on tensors. The cut of the work over threads is in run.h, what is computed in simd/.
//
// No step of a pass is an ATen operator: for a small x those would cost more than the work, and so would an allocation
// for every intermediate result.
#include "cpu/maps.h"
#include "cpu/pages.h"
#include "cpu/tail.h"
#include "cpu/transform.h"
#include "ops/operators.h"

namespace gc::cpu {

namespace {

template <typename T>
struct PoolForwardMemory {
  using A = acc_t<T>;
  A *copy, *partials, *rows;  // copy: of the mask's weight or of the logits
  NormMemory<T> norm;
  A* folded;  // the mask's weight times the slope, or the mean of each plane

  PoolForwardMemory(const FeatureMap& x, Weighting weighting, bool normalized, const Shape& shape, const Plan& plan,
                    Scratch<A>& scratch)
      : norm(x, scratch, normalized) {
    folded = scratch.take(normalized ? x.images() * x.channels() : 0);
    const int64_t row = shape.channels + kStatistics;
    copy = take_copy<T>(scratch, std::max(x.channels(), weighting == Weighting::kLogits ? x.images() * x.pixels() : 0));
    partials = scratch.take(plan.splits > 1 ? shape.images * plan.splits * row : 0);
    rows = scratch.take(weighting == Weighting::kUniform ? shape.images * row : 0);
  }
};

// The rows of groups of planes become the states of images: (0, S, mean).
template <typename A>
void states_from_rows(const FeatureMap& x, int64_t group, const A* rows, A* state) {
  for (int64_t image = 0; image < x.images(); ++image, state += x.channels() + kStatistics) {
    state[0] = 0;
    state[1] = static_cast<A>(x.pixels());
    for (int64_t c = 0; c < x.channels(); ++c) {
      const int64_t plane = image * x.channels() + c;
      state[kStatistics + c] = rows[plane / group * (group + kStatistics) + kStatistics + plane % group];
    }
  }
}

template <typename T>
struct PoolBackwardMemory {
  using A = acc_t<T>;
  A *grad_context, *mask_weight, *given_logits;  // copies
  A *attention, *grad_logits, *grad_logits_sums;
  A *weight_partials, *weight_sum;
  NormMemory<T> norm;
  A* scaled;  // the gradient of the context, times the slope

  PoolBackwardMemory(const FeatureMap& x, PoolGradient gradient, bool normalized, const Plan& plan, Scratch<A>& scratch)
      : norm(x, scratch, normalized) {
    scaled = scratch.take(normalized ? x.images() * x.channels() : 0);
    const int64_t pixels = x.images() * x.pixels(), splits = x.images() * plan.splits;
    const bool mask = gradient != PoolGradient::kLogits;
    grad_context = take_copy<T>(scratch, x.images() * x.channels());
    mask_weight = take_copy<T>(scratch, x.channels());
    given_logits = take_copy<T>(scratch, pixels);
    attention = scratch.take(pixels);
    grad_logits = scratch.take(pixels);
    grad_logits_sums = scratch.take(splits);
    weight_partials = scratch.take(mask ? splits * x.channels() : 0);
    weight_sum = scratch.take(mask ? x.channels() : 0);
  }
};

template <typename T>
struct BroadcastBackwardMemory {
  using A = acc_t<T>;
  struct Sum {
    A *partials, *copy;
  };
  Sum scale, term;
  A* given_scale;  // copy

  BroadcastBackwardMemory(const FeatureMap& x, const Shape& shape, const Plan& plan, Scratch<A>& scratch) {
    const int64_t count = x.images() * x.channels();
    for (Sum* sum : {&scale, &term}) {
      sum->partials = scratch.take(plan.splits > 1 ? shape.images * plan.splits * shape.channels : 0);
      sum->copy = take_copy<T>(scratch, count);
    }
    given_scale = take_copy<T>(scratch, count);
  }
};

class PoolForward {
 public:
  PoolForward(const FeatureMap& x, Weighting weighting, bool /*transform_follows*/ = false, bool normalized = false)
      : x_(x),
        weighting_(weighting),
        normalized_(normalized),
        shape_(weighting == Weighting::kUniform ? streaming(shape_of(x)) : shape_of(x)),
        plan_(plan_for(x, shape_)) {}
  Wanted wanted() const { return wanted_by<PoolForwardMemory>(x_, weighting_, normalized_, shape_, plan_); }
  static Unmerged left() { return {}; }
  void launch(const PoolForwardCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const bool uniform = weighting_ == Weighting::kUniform;
      const bool in_place = call.state != nullptr && shape_.images == x_.images() && shape_.channels == x_.channels();
      PoolArgs<T> args{};
      args.shape = shape_;
      args.plan = plan_;
      args.weighting = weighting_;
      args.divide_by_z = !uniform || call.factor != 1;
      args.x = static_cast<const T*>(x_.data());
      if (weighting_ == Weighting::kMask) {
        args.mask_weight = widen<T>(call.mask_weight, x_.channels(), memory.copy);
        A bias = 0;
        if (call.mask_bias.data != nullptr) args.mask_bias = *widen<T>(call.mask_bias, 1, &bias);
        args.logits = static_cast<A*>(call.logits);
        if (normalized_) fold(call.norm, memory, args);
      } else if (weighting_ == Weighting::kLogits) {
        args.logits = const_cast<A*>(widen<T>(call.given_logits, x_.images() * x_.pixels(), memory.copy));
      }
      if (normalized_ && uniform) {
        args.mean = static_cast<const A*>(call.norm.mean);
        if (shape_.images != x_.images()) {
          args.mean = for_each_image(args.mean, x_.images(), x_.channels(), memory.folded);
          args.mean_stride = shape_.channels;
        }
      }
      args.state = !uniform || in_place ? static_cast<A*>(call.state) : memory.rows;
      args.partials = plan_.splits > 1 ? memory.partials : args.state;
      args.context = static_cast<T*>(call.context);
      run(args);
      if (call.state != nullptr && args.state == memory.rows) {
        states_from_rows(x_, shape_.channels, memory.rows, static_cast<A*>(call.state));
      }
    };
    with_memory<PoolForwardMemory>(lent, body, x_, weighting_, normalized_, shape_, plan_);
    if (call.state_of_x != nullptr) contexts(x_, call.norm, call.state, call.state_of_x);
  }

 private:
  // logits = mask_weight . x + mask_bias = (mask_weight slope) . (y - mean) + (mask_weight . bias + mask_bias)
  template <typename T>
  void fold(const Norm& norm, const PoolForwardMemory<T>& memory, PoolArgs<T>& args) const {
    const NormVectors<T> vectors(norm, x_.channels(), memory.norm);
    args.mean = vectors.mean;
    double bias = 0;
    for (int64_t c = 0; c < x_.channels(); ++c) {
      memory.folded[c] = args.mask_weight[c] * vectors.slope[c];
      bias += static_cast<double>(args.mask_weight[c]) * vectors.bias[c];
    }
    args.mask_weight = memory.folded;
    args.mask_bias += static_cast<acc_t<T>>(bias);
  }

  const FeatureMap& x_;
  Weighting weighting_;
  bool normalized_;
  Shape shape_;  // without logits, planes are taken in small groups
  Plan plan_;
};

class PoolBackward {
 public:
  PoolBackward(const FeatureMap& x, PoolGradient gradient, const void*, const void*, bool normalized = false)
      : x_(x), gradient_(gradient), normalized_(normalized), shape_(shape_of(x)), plan_(plan_for(x, shape_)) {}
  Wanted wanted() const { return wanted_by<PoolBackwardMemory>(x_, gradient_, normalized_, plan_); }
  void launch(const PoolBackwardCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const int64_t pixels = x_.images() * x_.pixels();
      const bool mask = gradient_ != PoolGradient::kLogits;
      PoolBackwardArgs<T> args{};
      args.shape = shape_;
      args.plan = plan_;
      args.grad_context = widen<T>(call.grad_context, x_.images() * x_.channels(), memory.grad_context);
      args.x = static_cast<const T*>(x_.data());
      args.logits = widen<T>(call.logits, pixels, memory.given_logits);
      args.state = static_cast<const A*>(call.state);
      args.attention = call.attention != nullptr ? static_cast<A*>(call.attention) : memory.attention;
      const bool gives_logits = call.grad_logits.data != nullptr;
      args.grad_logits = gives_logits ? computed_in<T>(call.grad_logits, memory.grad_logits) : memory.grad_logits;
      args.grad_logits_sums = memory.grad_logits_sums;
      if (normalized_) {
        const NormVectors<T> vectors(call.norm, x_.channels(), memory.norm);
        args.mean = vectors.mean;
        args.grad_context = times(args.grad_context, vectors.slope, x_.images(), x_.channels(), memory.scaled);
      }
      args.grad_mask_weight = call.grad_weight.data != nullptr ? memory.weight_partials : nullptr;
      run(args);
      if (call.grad_x != nullptr) {
        GradXArgs<T> of_x{};
        of_x.shape = shape_;
        of_x.grad = static_cast<const T*>(call.grad);
        of_x.scale = widen<T>(call.scale, 0, nullptr);  // which a block keeps in the accumulation type
        of_x.attention = args.attention;
        of_x.grad_context = args.grad_context;
        of_x.grad_logits = args.grad_logits;
        of_x.mask_weight = mask ? widen<T>(call.mask_weight, x_.channels(), memory.mask_weight) : nullptr;
        of_x.grad_x = static_cast<T*>(call.grad_x);
        of_x.stream = past_caches(x_);
        run(of_x);
      }
      narrow<T>(args.grad_logits, call.grad_logits, pixels);
      if (args.grad_mask_weight == nullptr) return;
      A* const sum = computed_in<T>(call.grad_weight, memory.weight_sum);
      add_members<T>(args.grad_mask_weight, sum, 1, x_.images() * plan_.splits, x_.channels());
      narrow<T>(sum, call.grad_weight, x_.channels());
    };
    with_memory<PoolBackwardMemory>(lent, body, x_, gradient_, normalized_, plan_);
  }

 private:
  const FeatureMap& x_;
  PoolGradient gradient_;
  bool normalized_;
  Shape shape_;
  Plan plan_;
};

class BroadcastBackward {
 public:
  BroadcastBackward(const FeatureMap& x, const FeatureMap& grad, bool with_products, const void*,
                    bool /*transform_follows*/ = false)
      : x_(x), grad_(grad), with_products_(with_products), shape_(streaming(shape_of(x))), plan_(plan_for(x, shape_)) {}
  Wanted wanted() const { return wanted_by<BroadcastBackwardMemory>(x_, shape_, plan_); }
  static Unmerged left() { return {}; }
  void launch(const BroadcastBackwardCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      using A = acc_t<T>;
      const int64_t count = x_.images() * x_.channels();
      const auto partials = [&](const CompanionOut& result, const auto& sum) {
        A* const place = computed_in<T>(result, sum.copy);
        return place != nullptr && plan_.splits > 1 ? sum.partials : place;
      };
      BroadcastBackwardArgs<T> args{};
      args.shape = shape_;
      args.plan = plan_;
      args.grad = static_cast<const T*>(grad_.data());
      args.x = with_products_ ? static_cast<const T*>(x_.data()) : nullptr;
      args.scale = widen<T>(call.scale, count, memory.given_scale);
      args.grad_x = static_cast<T*>(call.grad_x);
      args.grad_scale = partials(call.grad_scale, memory.scale);
      args.grad_term = partials(call.grad_term, memory.term);
      run(args);
      const auto finish = [&](const CompanionOut& result, const auto& sum) {
        A* const place = computed_in<T>(result, sum.copy);
        if (place != nullptr && plan_.splits > 1) {
          add_members<T>(sum.partials, place, shape_.images, plan_.splits, shape_.channels);
        }
        narrow<T>(place, result, count);
      };
      finish(call.grad_scale, memory.scale);
      finish(call.grad_term, memory.term);
    };
    with_memory<BroadcastBackwardMemory>(lent, body, x_, shape_, plan_);
  }

 private:
  const FeatureMap &x_, &grad_;
  bool with_products_;
  Shape shape_;  // planes are taken in small groups
  Plan plan_;
};

struct Device {
  using PoolForward = cpu::PoolForward;
  using PoolBackward = cpu::PoolBackward;
  using BroadcastBackward = cpu::BroadcastBackward;
  using TransformForward = cpu::TransformForward;
  using TransformBackward = cpu::TransformBackward;
  using Statistics = cpu::Statistics;
  using Residual = cpu::Residual;
  using ResidualSums = cpu::ResidualSums;
  using GradY = cpu::GradY;

  struct Counters {  // threads meet where a pass ends
    Counters(int64_t, const FeatureMap&) {}
    static unsigned* get() { return nullptr; }
  };

  static constexpr auto norm_gradients = cpu::norm_gradients;
  static Tensor empty_output(const FeatureMap& x) { return cpu::empty_output(x.tensor().sizes(), x.like()); }
  static void broadcast(const FeatureMap& x, const BroadcastCall& call) {
    if (x.images() == 0) return;
    const int64_t count = x.images() * x.channels();
    dispatch(x.type(), [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      std::array<Tensor, 2> copies;  // of vectors in T; those of a block are not
      const auto wide_vector = [&](Companion vector, Tensor& copy) {
        if (!kHasCopies<T> || vector.data == nullptr || vector.wide) return widen<T>(vector, 0, nullptr);
        copy = x.empty_accumulation({count});
        return widen<T>(vector, count, copy.template data_ptr<A>());
      };
      BroadcastArgs<T> args{};
      args.shape = shape_of(x);
      args.x = static_cast<const T*>(x.data());
      args.scale = wide_vector(call.scale, copies[0]);
      args.term = wide_vector(call.term, copies[1]);
      args.out = static_cast<T*>(call.out);
      args.stream = past_caches(x);
      run(args);
    });
  }
};

}  // namespace

}  // namespace gc::cpu

TORCH_LIBRARY_IMPL(gc_cuda, CPU, m) {
  gc::ops::register_operators<gc::cpu::Device>(m);
  gc::ops::register_tail<gc::cpu::Device>(m);
}
