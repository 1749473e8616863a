// Mean and variance of each channel, of the batch or given, and the running ones.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/contexts.h"
#include "cpu/maps.h"
#include "cpu/run.h"
#include "cpu/scratch.h"

namespace gc::cpu {

template <typename T>
struct StatisticsMemory {
  using A = acc_t<T>;
  A *centre, *sums, *squares;                    // [N, splits, C]
  A *given_mean, *given_variance, *given_bias;   // copies
  A *mean, *variance, *new_mean, *new_variance;  // copies, of the running ones

  StatisticsMemory(const FeatureMap& y, bool of_batch, const Shape& shape, const Plan& plan, Scratch<A>& scratch) {
    const int64_t partials = of_batch ? shape.images * plan.splits * shape.channels : 0;
    for (A** const place : {&centre, &sums, &squares}) *place = scratch.take(partials);
    for (A** const place : {&given_mean, &given_variance, &given_bias}) *place = take_copy<T>(scratch, y.channels());
    for (A** const place : {&mean, &variance, &new_mean, &new_variance}) *place = scratch.take(y.channels());
  }
};

class Statistics {
 public:
  Statistics(const FeatureMap& y, bool of_batch)
      : y_(y), of_batch_(of_batch), shape_(streaming(shape_of(y))), plan_(plan_for(y, shape_)) {}
  Wanted wanted() const { return wanted_by<StatisticsMemory>(y_, of_batch_, shape_, plan_); }
  void launch(const StatisticsCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      const auto* const bias = widen<T>(call.given_bias, y_.channels(), memory.given_bias);
      for (int64_t c = 0; c < y_.channels(); ++c) static_cast<acc_t<T>*>(call.bias)[c] = bias ? bias[c] : 0;
      if (of_batch_) {
        take_batch<T>(call, memory);
        move_running<T>(call, memory);
      } else {
        take_given<T>(call, memory);
      }
    };
    with_memory<StatisticsMemory>(lent, body, y_, of_batch_, shape_, plan_);
    if (call.state_of_x == nullptr) return;
    const Norm norm{call.mean, call.inverse_std, call.weight, {call.bias, true}};
    contexts(y_, norm, call.state, call.state_of_x);
  }

 private:
  template <typename T>
  void take_given(const StatisticsCall& call, const StatisticsMemory<T>& memory) const {
    using A = acc_t<T>;
    const A* const mean = widen<T>(call.given_mean, y_.channels(), memory.given_mean);
    const A* const variance = widen<T>(call.given_variance, y_.channels(), memory.given_variance);
    for (int64_t c = 0; c < y_.channels(); ++c) {
      static_cast<A*>(call.mean)[c] = mean ? mean[c] : A(0);
      static_cast<A*>(call.variance)[c] = variance ? variance[c] : A(1);
      static_cast<A*>(call.inverse_std)[c] = variance ? inverse_std<A>(variance[c], call.eps) : A(1);
    }
  }

  template <typename T>
  void take_batch(const StatisticsCall& call, const StatisticsMemory<T>& memory) const {
    using A = acc_t<T>;
    StatisticsArgs<T> args{};
    args.shape = shape_;
    args.plan = plan_;
    args.y = static_cast<const T*>(y_.data());
    args.centre = memory.centre;
    args.sums = memory.sums;
    args.squares = memory.squares;
    run(args);
    std::vector<Moments> planes(y_.images() * y_.channels());
    const int64_t elements = 4 * plan_.splits * shape_.channels;
    parallel(shape_.images, elements, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) merge_splits<T>(args, row, planes.data() + row * shape_.channels);
    });
    parallel(y_.channels(), 4 * y_.images(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) merge_images<A>(planes.data() + c, c, call);
    });
  }

  struct Moments {
    double mean = 0;
    double squares = 0;  // of the distances to the mean, summed
  };

  // Of the channels that the shape has for one of its images, which may be a group of planes. In double, where squares
  // of the mean's rounding are nothing.
  template <typename T>
  void merge_splits(const StatisticsArgs<T>& args, int64_t row, Moments* planes) const {
    const int64_t channels = shape_.channels;
    const auto each = [&](const auto& take) {
      for (int64_t k = row * plan_.splits; k < (row + 1) * plan_.splits; ++k) {
        const Split split = split_at(shape_, plan_, k);
        const double count = static_cast<double>(split.end - split.begin), part = 1 / count;
        for (int64_t c = 0; c < channels; ++c) {
          const double sum = args.sums[k * channels + c], square = args.squares[k * channels + c];
          take(planes[c], count, args.centre[k * channels + c] + sum * part, square - sum * sum * part);
        }
      }
    };
    const double share = 1 / static_cast<double>(shape_.pixels);
    each([&](Moments& plane, double count, double mean, double) { plane.mean += count * mean * share; });
    each([&](Moments& plane, double count, double mean, double squares) {
      plane.squares += squares + count * (mean - plane.mean) * (mean - plane.mean);
    });
    for (int64_t c = 0; c < channels; ++c) {
      if (!std::isfinite(planes[c].squares) && std::isfinite(planes[c].mean)) sum_squares<T>(row, c, planes[c]);
    }
  }

  // The squares of numbers above 1e19 are too large for a float.
  template <typename T>
  void sum_squares(int64_t row, int64_t c, Moments& plane) const {
    const T* const y = static_cast<const T*>(y_.data()) + row * shape_.channels * shape_.pixels;
    plane.squares = 0;
    for (int64_t s = 0; s < shape_.pixels; ++s) {
      const double value = y[shape_.channels_last ? s * shape_.channels + c : c * shape_.pixels + s];
      plane.squares += (value - plane.mean) * (value - plane.mean);
    }
  }

  // planes: of the first image; those of the others are C apart.
  template <typename A>
  void merge_images(const Moments* planes, int64_t c, const StatisticsCall& call) const {
    const double pixels = static_cast<double>(y_.pixels()), count = pixels * static_cast<double>(y_.images());
    double mean = 0, squares = 0;
    for (int64_t n = 0; n < y_.images(); ++n) mean += planes[n * y_.channels()].mean;
    mean /= static_cast<double>(y_.images());
    for (int64_t n = 0; n < y_.images(); ++n) {
      const Moments& plane = planes[n * y_.channels()];
      squares += plane.squares + pixels * (plane.mean - mean) * (plane.mean - mean);
    }
    const A rounded = static_cast<A>(mean);
    static_cast<A*>(call.mean)[c] = rounded;
    static_cast<A*>(call.inverse_std)[c] = inverse_std<A>(squares / count, call.eps);
    static_cast<A*>(call.variance)[c] = static_cast<A>(squares / (count - 1));
    if (call.state == nullptr) return;
    A* state = static_cast<A*>(call.state);
    for (int64_t n = 0; n < y_.images(); ++n, state += y_.channels() + kStatistics) {
      if (c == 0) {
        state[0] = 0;
        state[1] = static_cast<A>(y_.pixels());
      }
      state[kStatistics + c] = static_cast<A>(planes[n * y_.channels()].mean - static_cast<double>(rounded));
    }
  }

  template <typename T>
  void move_running(const StatisticsCall& call, const StatisticsMemory<T>& memory) const {
    move<T>(call.running_mean, call.mean, call.momentum, memory.mean, memory.new_mean);
    move<T>(call.running_variance, call.variance, call.momentum, memory.variance, memory.new_variance);
  }

  template <typename T>
  void move(CompanionOut running, const void* of_batch, double momentum, acc_t<T>* copy, acc_t<T>* moved) const {
    using A = acc_t<T>;
    if (running.data == nullptr) return;
    const A* const before = widen<T>({running.data, running.wide}, y_.channels(), copy);
    A* const after = computed_in<T>(running, moved);
    for (int64_t c = 0; c < y_.channels(); ++c) {
      const double to = static_cast<const A*>(of_batch)[c];
      after[c] = static_cast<A>(momentum * to + (1 - momentum) * before[c]);
    }
    narrow<T>(after, running, y_.channels());
  }

  template <typename A>
  static A inverse_std(double variance, double eps) {
    return static_cast<A>(1 / std::sqrt(variance + eps));
  }

  const FeatureMap& y_;
  bool of_batch_;
  Shape shape_;  // planes are taken in small groups
  Plan plan_;
};

}  // namespace gc::cpu
