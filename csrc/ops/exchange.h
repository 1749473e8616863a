// What the processes of a group tell each other about a batch norm whose batch is spread over them, each in one message:
// (count, mean, M2) of every channel in the forward pass, the sums of two gradients in the backward pass.
//
// In tensor operations, which every device has. The collectives are those of torch.distributed that are operators of
// the dispatcher themselves, so that nothing is linked against it and a pass is one operator still.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "ops/memory.h"
#include "ops/state.h"
#include "ops/tail_problem.h"

namespace gc::ops {

// The running statistics that a call moves.
struct Running {
  OptionalTensor mean, variance;
  double momentum = 0;
};

inline Tensor collective(const char* name, std::vector<c10::IValue> arguments) {
  const auto call = [](const char* of_name, std::vector<c10::IValue> stack) {
    c10::Dispatcher::singleton().findSchemaOrThrow(of_name, "").callBoxed(stack);
    return stack.front().toTensor();
  };
  return call("_c10d_functional::wait_tensor", {call(name, std::move(arguments))});
}

// count, means and squares [processes, 1 + 2 C] -> those of all [1, 1 + 2 C]. Neighbours are merged two by two: in the
// same order everywhere, so that all processes get the same bits.
inline Tensor merged(Tensor moments) {
  const int64_t channels = (moments.size(1) - 1) / 2;
  const auto count = [](const Tensor& of) { return of.narrow(1, 0, 1); };
  const auto means = [&](const Tensor& of) { return of.narrow(1, 1, channels); };
  const auto squares = [&](const Tensor& of) { return of.narrow(1, 1 + channels, channels); };
  while (moments.size(0) > 1) {
    const int64_t rows = moments.size(0), half = rows / 2;
    const Tensor one = moments.narrow(0, 0, half), other = moments.narrow(0, half, half);
    const Tensor total = count(one) + count(other), share = count(other) / total.clamp_min(1);
    const Tensor distance = means(other) - means(one);
    const Tensor pairs = at::cat({total, means(one) + distance * share,
                                  squares(one) + squares(other) + distance * distance * (count(one) * share)},
                                 1);
    moments = at::cat({pairs, moments.narrow(0, 2 * half, rows - 2 * half)}, 0);
  }
  return moments;
}

// Statistics of y's own batch become those of all, and running ones move by them. y may have no image.
inline void exchange_statistics(const FeatureMap& y, const StatisticsCall& taken, double eps, const Running& running,
                                const Group& group) {
  const int64_t channels = y.channels(), count = y.images() * y.pixels();
  const Tensor mean = view_of(y, taken.mean, 1, channels), variance = view_of(y, taken.variance, 1, channels);
  const Tensor own_mean = mean.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  const Tensor message = at::zeros({1, 1 + 2 * channels}, own_mean.options());
  message.narrow(1, 0, 1).fill_(count);
  if (count > 0) message.narrow(1, 1, channels).copy_(own_mean);
  if (count > 1) message.narrow(1, 1 + channels, channels).copy_(variance.to(at::kDouble) * (count - 1));

  const Tensor moments =
      merged(collective("_c10d_functional::all_gather_into_tensor", {message, group.size, group.name}));
  const Tensor total = moments.narrow(1, 0, 1), squares = moments.narrow(1, 1 + channels, channels);
  // A number that is on another device would be waited for.
  TORCH_CHECK_VALUE(!total.is_cpu() || total.item<double>() != 1,
                    "Expected more than 1 value per channel when training, got 1 in all processes of the group");
  mean.copy_(moments.narrow(1, 1, channels));
  view_of(y, taken.inverse_std, 1, channels).copy_((squares / total.clamp_min(1) + eps).rsqrt());
  variance.copy_(squares / (total - 1));
  if (taken.state != nullptr && y.images() > 0) {  // of y - mean
    Tensor context = view_of(y, taken.state, y.images(), kStatistics + channels).narrow(1, kStatistics, channels);
    context.copy_(context.to(at::kDouble) + (own_mean - mean.to(at::kDouble)));
  }
  const auto move = [&](const OptionalTensor& one, const Tensor& of_all) {
    if (!one.has_value()) return;
    const Tensor before = one->to(at::kDouble), to = of_all.view(-1).to(at::kDouble);
    const Tensor after = running.momentum * to + (1 - running.momentum) * before;
    one->copy_(at::where(total.view(-1) > 0, after, before));
  };
  move(running.mean, mean);
  move(running.variance, variance);
}

// The context of x from that of y - mean, which an exchange of the statistics has changed.
inline void contexts_of_x(const FeatureMap& y, const StatisticsCall& taken, const Tensor& weight, const Tensor& bias) {
  const auto context = [&](void* state) {
    return view_of(y, state, y.images(), kStatistics + y.channels()).narrow(1, kStatistics, y.channels());
  };
  Tensor slope = view_of(y, taken.inverse_std, 1, y.channels()), of_x = context(taken.state);
  if (weight.defined()) slope = slope * weight;
  of_x = of_x * slope;
  if (bias.defined()) of_x = of_x + bias;
  context(taken.state_of_x).copy_(of_x);
}

// The sums over y's own batch [C] become those over all, times this process's share of the batch: what is computed from
// them divides by its own count. y may have no image; the sums may be null then.
inline void exchange_sums(const FeatureMap& y, void* weight_sum, void* bias_sum, const Group& group) {
  const int64_t channels = y.channels(), count = y.images() * y.pixels();
  const Tensor message = at::zeros({1, 1 + 2 * channels}, y.tensor().options().dtype(at::kDouble));
  message.narrow(1, 0, 1).fill_(count);
  const auto each = [&](const Tensor& sums, const auto& take) {
    if (count == 0) return;
    take(view_of(y, weight_sum, 1, channels), sums.narrow(1, 1, channels));
    take(view_of(y, bias_sum, 1, channels), sums.narrow(1, 1 + channels, channels));
  };
  each(message, [](const Tensor& own, const Tensor& place) { place.copy_(own); });
  const Tensor sums = collective("_c10d_functional::all_reduce", {message, "sum", group.name});
  const Tensor share = count / sums.narrow(1, 0, 1);
  each(sums, [&](const Tensor& own, const Tensor& of_all) { own.copy_(of_all * share); });
}

}  // namespace gc::ops
