// The whole context block as csrc/ops/global_context.h launches it on a GPU, with its buffers and what it must give.
#pragma once

#include "transform_cases.h"

namespace gc::drivers {

// Large enough for the small vectors and weights to be what they are in a network: below 5 % of the feature map.
inline constexpr Shape kShape = {2, 128, 3136};
inline constexpr int kHidden = 8;

struct Fusion {
  const char* name;
  bool add, mul;
};

template <typename T>
struct Block {
  using A = Acc<T>;
  using Vector = SmallVector<T>;

  bool attention;
  Fusion fusion;
  Layout layout;
  DeviceLimits device;
  int first = fusion.add ? 0 : 1, branches = fusion.add + fusion.mul;
  std::size_t maps = kShape.elements(), pixels = static_cast<std::size_t>(kShape.images) * kShape.pixels,
              outputs = static_cast<std::size_t>(kShape.images) * kShape.channels,
              units = static_cast<std::size_t>(kShape.images) * kHidden,
              matrix = static_cast<std::size_t>(kHidden) * kShape.channels;

  std::vector<std::function<host::Traffic()>> traffic;  // of every buffer

  FeatureMap<T> x{"x", kShape, layout, Use::kInput};
  FeatureMap<T> grad{"grad", kShape, layout, Use::kInput};
  FeatureMap<T> out{"out", kShape, layout, Use::kOutput};
  FeatureMap<T> grad_x{"grad_x", kShape, layout, Use::kOutput};

  // Everything else is small. Parameters are in the accumulation type, as under autocast.
  std::vector<std::unique_ptr<Buffer<A>>> small;
  const Buffer<A>* partials = nullptr;  // of the pass's sums over pixels
  A* mask_weight = input("mask_weight", kShape.channels, 0.3);
  A* mask_bias = input("mask_bias", 1, 1);
  A* logits = output("logits", pixels);
  A* state = output("state", outputs + 2 * kShape.images);
  A* grad_context = output("grad_context", outputs);
  A* grad_mask_weight = output("grad_mask_weight", kShape.channels);

  struct Branch {
    A *w1, *b1, *norm_weight, *norm_bias, *w2, *b2;
    A *products, *normalized, *inverse_deviation, *out, *grad_out;
    A *grad_w1, *grad_b1, *grad_norm_weight, *grad_norm_bias, *grad_w2, *grad_b2;
  };
  Branch branch[2];

  Block(bool attention_, const Fusion& fusion_, Layout layout_, Paths paths, int multiprocessors = 1)
      : attention(attention_), fusion(fusion_), layout(layout_), device{multiprocessors, host::kMaxSharedOptIn, paths} {
    Numbers numbers(12);
    x.fill(numbers, 2);
    grad.fill(numbers, 1);
    for (FeatureMap<T>* map : {&x, &grad, &out, &grad_x}) {
      traffic.push_back([map] { return map->buffer().traffic(); });
    }
    for (int b = 0; b < branches; ++b) {
      branch[b] = {input("w1", matrix, 0.3),
                   input("b1", kHidden, 1),
                   input("norm_weight", kHidden, 2),
                   input("norm_bias", kHidden, 1),
                   input("w2", matrix, 1),
                   input("b2", kShape.channels, 1),
                   output("products", units),
                   output("normalized", units),
                   output("inverse_deviation", kShape.images),
                   output("branch_out", outputs),
                   output("grad_out", outputs),
                   output("grad_w1", matrix),
                   output("grad_b1", kHidden),
                   output("grad_norm_weight", kHidden),
                   output("grad_norm_bias", kHidden),
                   output("grad_w2", matrix),
                   output("grad_b2", kShape.channels)};
    }
  }

  A* add(std::unique_ptr<Buffer<A>> buffer) {
    const Buffer<A>* const kept = buffer.get();
    traffic.push_back([kept] { return kept->traffic(); });
    small.push_back(std::move(buffer));
    return small.back()->data();
  }
  A* output(const std::string& name, std::size_t count) {
    return add(std::make_unique<Buffer<A>>(name, count, Use::kOutput));
  }
  A* input(const std::string& name, std::size_t count, double scale) {
    Numbers numbers(static_cast<unsigned>(13 + small.size()));
    auto buffer = std::make_unique<Buffer<A>>(name, count, Use::kState);
    for (std::size_t i = 0; i < count; ++i) (*buffer)[i] = static_cast<A>(numbers(scale));
    return add(std::move(buffer));
  }

  // Only the first launch of a pass can leave its partial results to a transform.
  Plan plan(KernelKind kind) const {
    DeviceLimits limits = device;
    limits.paths = limits.paths.without(Path::kLateMerge);
    return plan(kind, limits);
  }
  Plan plan(KernelKind kind, const DeviceLimits& limits) const {
    return make_plan(kind, {kShape.images, kShape.channels, kShape.pixels, layout, Element<T>::type}, limits);
  }
  TransformProblem problem() const {
    return {kShape.images, kShape.channels, branches, {kHidden, kHidden}, Element<T>::type, true};
  }
  Gate gate_of(int b) const { return fusion.mul && b == branches - 1 ? Gate::kSigmoid : Gate::kNone; }
  static Companion wide(const A* data) { return {data, true}; }
  static CompanionOut wide_out(A* data) { return {data, true}; }
  Companion scale() const { return fusion.mul ? wide(branch[branches - 1].out) : Companion{}; }

  Plan pool_plan() const { return plan(attention ? KernelKind::kPoolMask : KernelKind::kPoolUniform, device); }

  // The first launch of a pass waits for all that the stream has done; the others may begin while the one before ends.
  template <typename AnyPlan>
  void run_one(const AnyPlan& plan, const host::Schedule& schedule, const std::function<cudaError_t()>& launch) const {
    run_launch(plan, schedule, launch);
    const int number = host::LaunchFiles::launches;  // 1 to 3
    const bool early = number > 1 && device.paths.has(Path::kEarlyStart) && !host::LaunchFiles::refuse_early;
    host::require(host::LaunchFiles::last.early == early, "which launches of a pass begin early");
    host::require(host::LaunchFiles::last.lets_next_begin == (number < 3), "which let the next begin");
  }

  void forward(const host::Schedule& schedule) {
    const Plan pool = pool_plan();
    host::require(pool.paths == device.paths.without(Path::kEarlyStart),
                  "a plan of the paths that are switched on: " + pool.to_string());
    Tickets tickets(pool);
    PoolForwardArgs pooling{};
    pooling.x = x.buffer().data();
    pooling.mask_weight = wide(mask_weight);
    pooling.mask_bias = wide(mask_bias);
    pooling.factor = 1.0 / kShape.pixels;
    pooling.logits = attention ? logits : nullptr;
    pooling.state = state;
    pooling.partial_context = output("pool_workspace", pool.workspace);
    partials = small.back().get();
    pooling.partial_stats =
        static_cast<A*>(pooling.partial_context) + outputs * merged_rows(pool.walk.splits, pool.walk.group);
    pooling.tickets = tickets.data();
    run_one(pool, schedule, [&] { return launch_pool_forward(pool, pooling, nullptr); });

    const TransformPlan small_plan = make_transform_forward_plan(problem(), device);
    PhaseCounters counters(small_plan);
    TransformForwardArgs transform{};
    transform.counters = counters.data();
    transform.images = kShape.images;
    transform.channels = kShape.channels;
    transform.branches = branches;
    transform.eps = 1e-5;
    transform.context = state + 2;
    transform.context_stride = kShape.channels + 2;
    for (int b = 0; b < branches; ++b) {
      const Branch& own = branch[b];
      transform.branch[b] = {
          kHidden,      wide(own.w1), wide(own.b1), wide(own.norm_weight), wide(own.norm_bias),   wide(own.w2),
          wide(own.b2), gate_of(b),   own.products, own.normalized,        own.inverse_deviation, own.out};
    }
    const void* const stats = attention ? pooling.partial_stats : nullptr;
    transform.partial = {pool.walk.splits, kShape.pixels, pooling.partial_context, stats, 2LL * pool.walk.splits,
                         pooling.factor,   pooling.state};
    run_one(small_plan, schedule, [&] { return launch_transform_forward(small_plan, transform, nullptr); });

    const Plan apply = plan(KernelKind::kBroadcast);
    BroadcastArgs broadcast{};
    broadcast.x = x.buffer().data();
    broadcast.scale = scale();
    if (fusion.add) broadcast.term = wide(branch[0].out);
    broadcast.out = out.buffer().data();
    run_one(apply, schedule, [&] { return launch_broadcast(apply, broadcast, nullptr); });
  }

  void backward(const host::Schedule& schedule) {
    const PartialGradients left = sum_gradients(schedule);

    const TransformPlan small_plan = make_transform_backward_plan(problem(), device, TransformDepth::kContext);
    const bool merges = small_plan.paths.has(Path::kLateMerge);
    PhaseCounters counters(small_plan);
    TransformBackwardArgs transform{};
    transform.counters = counters.data();
    transform.images = kShape.images;
    transform.channels = kShape.channels;
    transform.branches = branches;
    transform.context = state + 2;
    transform.context_stride = kShape.channels + 2;
    transform.factor = attention ? 1 : 1.0 / kShape.pixels;
    transform.grad_context = grad_context;
    transform.partial = left;
    for (int b = 0; b < branches; ++b) {
      const Branch& own = branch[b];
      const TransformWorkspace sizes = backward_workspace(problem(), small_plan, b);
      transform.branch[b] = {kHidden,
                             wide(own.w1),
                             wide(own.norm_weight),
                             wide(own.norm_bias),
                             wide(own.w2),
                             own.normalized,
                             own.inverse_deviation,
                             merges ? nullptr : own.grad_out,
                             gate_of(b),
                             own.out,
                             wide_out(own.grad_w1),
                             wide_out(own.grad_b1),
                             wide_out(own.grad_norm_weight),
                             wide_out(own.grad_norm_bias),
                             wide_out(own.grad_w2),
                             wide_out(own.grad_b2),
                             output("partial_y", sizes.partial_y),
                             output("grad_y", sizes.grad_y),
                             output("grad_hidden", sizes.grad_hidden),
                             output("partial_context", sizes.partial_context)};
    }
    run_one(small_plan, schedule, [&] { return launch_transform_backward(small_plan, transform, nullptr); });

    if (attention) return last_pass(schedule);
    const Plan apply = plan(KernelKind::kBroadcast);
    BroadcastArgs broadcast{};
    broadcast.x = grad.buffer().data();
    broadcast.scale = scale();
    broadcast.term = wide(grad_context);
    broadcast.out = grad_x.buffer().data();
    run_one(apply, schedule, [&] { return launch_broadcast(apply, broadcast, nullptr); });
  }

  Plan sums_plan() const {
    return plan(fusion.mul ? KernelKind::kBroadcastMulBackward : KernelKind::kPoolUniform, device);
  }

  // Of each branch, what is left where the transform merges it.
  PartialGradients sum_gradients(const host::Schedule& schedule) {
    const Plan sums = sums_plan();
    Tickets tickets(sums);
    A* const workspace = output("sum_workspace", sums.workspace);
    partials = small.back().get();
    PartialGradients left{};
    left.splits = sums.walk.splits;
    if (fusion.mul) left.sums[branches - 1] = workspace;
    if (fusion.add) left.sums[0] = workspace + (fusion.mul ? outputs * left.splits : 0);
    if (!fusion.mul) {
      PoolForwardArgs args{};
      args.x = grad.buffer().data();
      args.factor = 1;
      args.context = wide_out(branch[0].grad_out);
      args.partial_context = workspace;
      args.tickets = tickets.data();
      run_one(sums, schedule, [&] { return launch_pool_forward(sums, args, nullptr); });
      return left;
    }
    BroadcastMulBackwardArgs args{};
    args.grad = grad.buffer().data();
    args.x = x.buffer().data();
    args.grad_scale = wide_out(branch[branches - 1].grad_out);
    if (fusion.add) args.grad_term = wide_out(branch[0].grad_out);
    args.partial_sums = workspace;
    args.tickets = tickets.data();
    run_one(sums, schedule, [&] { return launch_broadcast_mul_backward(sums, args, nullptr); });
    return left;
  }

  void last_pass(const host::Schedule& schedule) {
    const Plan last = plan(KernelKind::kPoolBackwardBlock);
    Tickets tickets(last);
    PoolBackwardArgs args{};
    args.x = x.buffer().data();
    args.grad = grad.buffer().data();
    args.scale = scale();
    args.grad_context = wide(grad_context);
    args.mask_weight = wide(mask_weight);
    args.logits = wide(logits);
    args.state = state;
    args.grad_x = grad_x.buffer().data();
    args.grad_weight = wide_out(grad_mask_weight);
    args.partial_weight = output("weight_workspace", last.workspace);
    args.tickets = tickets.data();
    run_one(last, schedule, [&] { return launch_pool_backward(last, args, nullptr); });
  }

  double passes() const {
    std::uint64_t bytes = 0;
    for (const auto& of_buffer : traffic) bytes += of_buffer().fetched + of_buffer().written;
    return static_cast<double>(bytes) / static_cast<double>(x.buffer().bytes());
  }

  // The context, from x.
  void check_state() const {
    for (int n = 0; n < kShape.images; ++n) {
      std::vector<double> weight(kShape.pixels, 1);
      double most = -HUGE_VAL, z = 0, size = 0;
      for (int s = 0; attention && s < kShape.pixels; ++s) {
        weight[s] = mask_bias[0];
        double own_size = 0;
        for (int c = 0; c < kShape.channels; ++c) {
          weight[s] += mask_weight[c] * x(n, c, s);
          own_size += std::abs(mask_weight[c] * x(n, c, s));
        }
        most = std::max(most, weight[s]);
        size = std::max(size, own_size);
      }
      for (int s = 0; s < kShape.pixels; ++s) z += weight[s] = attention ? std::exp(weight[s] - most) : 1;
      const double error = 2 * sum_error<T>(kShape.channels) * size + 2 * sum_error<T>(kShape.pixels);
      for (int c = 0; c < kShape.channels; ++c) {
        double sum = 0, sizes = 0;
        for (int s = 0; s < kShape.pixels; ++s) {
          sum += weight[s] * x(n, c, s) / z;
          sizes += weight[s] * std::abs(x(n, c, s)) / z;
        }
        const std::size_t own = static_cast<std::size_t>(n) * (kShape.channels + 2) + 2 + c;
        host::require_close("context", state[own], sum, error * sizes);
      }
    }
  }

  // out = x * scale + term, from the scale and term that the launches left.
  void check_out() const {
    for (int n = 0; n < kShape.images; ++n) {
      for (int c = 0; c < kShape.channels; ++c) {
        const std::size_t nc = static_cast<std::size_t>(n) * kShape.channels + c;
        const double times = fusion.mul ? branch[branches - 1].out[nc] : 1;
        const double plus = fusion.add ? branch[0].out[nc] : 0;
        for (int s = 0; s < kShape.pixels; s += 97) {
          const double want = x(n, c, s) * times + plus;
          host::require_close("out", out(n, c, s), want,
                              store_error<T>(want) + 4 * Element<A>::roundoff * (2 + std::abs(want)));
        }
      }
    }
  }

  // The sum of grad_x over an image is that of grad * scale, and grad_context: attention adds up to 1, and the
  // gradients of its logits to 0.
  void check_grad_x() const {
    for (int n = 0; n < kShape.images; ++n) {
      for (int c = 0; c < kShape.channels; ++c) {
        const std::size_t nc = static_cast<std::size_t>(n) * kShape.channels + c;
        double want = grad_context[nc] * (attention ? 1 : kShape.pixels), got = 0, size = std::abs(want);
        for (int s = 0; s < kShape.pixels; ++s) {
          const double past = grad(n, c, s) * (fusion.mul ? branch[branches - 1].out[nc] : 1);
          want += past;
          got += grad_x(n, c, s);
          size += std::abs(past) + std::abs(grad_x(n, c, s));
        }
        host::require_close("sum of grad_x", got, want, (Element<T>::roundoff + sum_error<T>(kShape.pixels)) * size);
      }
    }
  }
};

}  // namespace gc::drivers
