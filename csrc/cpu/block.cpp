// The whole block as one operator: pool, transform, broadcast; and its backward pass. x is read twice and out written
// once; backward, grad is read (with mul x along with it), then x, then grad again, and grad_x is written.
//
// Everything between the two passes over x has N * C or P * C elements. No step of it is an ATen operator: for a small
// x those would cost more than the work.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "branches.h"
#include "cpu/feature_map.h"
#include "cpu/run.h"
#include "cpu/transform.h"

namespace gc::cpu {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
acc_t<T> scalar(const Tensor& tensor) {
  return with_weight<T>(tensor, [](auto* data) { return static_cast<acc_t<T>>(*data); });
}

struct Forward {
  Tensor out;
  Tensor logits;
  Tensor state;
  Tensor normalized;
  Tensor inverse_deviation;
  Tensor scale;
};

// The mean of the pixels as a state: (0, S, mean). NCHW planes are taken in small groups.
template <typename T>
void pool_average(const FeatureMap& x, acc_t<T>* state, Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const Shape shape = streaming(x.shape);
  const Plan plan = make_plan(shape, sizeof(T));
  const int64_t group = shape.channels;
  const bool whole = shape.images == x.shape.images && group == x.shape.channels;
  A* means = whole ? state : scratch.take(shape.images * (group + 2));
  A* partials = plan.splits == 1 ? means : scratch.take(shape.images * plan.splits * (group + 2));
  run(PoolArgs<T>{shape, plan, Weights::kUniform, true, x.tensor.data_ptr<T>(), nullptr, A(0), nullptr, partials, means,
                  nullptr});
  if (whole) return;
  for (int64_t image = 0; image < x.shape.images; ++image) {
    A* row = state + image * (x.shape.channels + 2);
    row[0] = 0;
    row[1] = static_cast<A>(x.shape.pixels);
    for (int64_t c = 0; c < x.shape.channels; ++c) {
      const int64_t plane = image * x.shape.channels + c;
      row[2 + c] = means[plane / group * (group + 2) + 2 + plane % group];
    }
  }
}

template <typename T>
void pool_attention(const FeatureMap& x, const Tensor& mask_weight, const OptionalTensor& mask_bias, acc_t<T>* logits,
                    acc_t<T>* state, Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const Shape& shape = x.shape;
  const Plan plan = make_plan(shape, sizeof(T));
  A* partials = plan.splits == 1 ? state : scratch.take(shape.images * plan.splits * (shape.channels + 2));
  run(PoolArgs<T>{shape, plan, Weights::kMask, true, x.tensor.data_ptr<T>(), scratch.template widened<T>(mask_weight),
                  mask_bias ? scalar<T>(*mask_bias) : A(0), logits, partials, state, nullptr});
}

template <typename T>
Forward run_forward(const FeatureMap& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                    const Branches& branches, double eps, Kinds kinds) {
  using A = acc_t<T>;
  const int64_t images = x.shape.images, channels = x.shape.channels;
  const at::TensorOptions options = x.accumulation();
  Scratch<A> scratch(options);
  Forward result;
  result.state = at::empty({images, channels + 2}, options);
  A* state = result.state.data_ptr<A>();
  if (mask_weight) {
    result.logits = at::empty({images, x.shape.pixels}, options);
    pool_attention<T>(x, *mask_weight, mask_bias, result.logits.data_ptr<A>(), state, scratch);
  } else {
    result.logits = at::empty({0}, options);
    pool_average<T>(x, state, scratch);
  }

  result.normalized = at::empty({images * branches.hidden()}, options);
  result.inverse_deviation = at::empty({branches.count(), images}, options);
  result.scale = branches.has(kMul) ? at::empty({images, channels}, options) : at::empty({0}, options);
  A* const applied[] = {branches.has(kAdd) ? scratch.take(images * channels) : nullptr,
                        branches.has(kMul) ? result.scale.data_ptr<A>() : nullptr};
  A* activated = scratch.take(images * branches.hidden());

  std::vector<Share> first, second;
  std::vector<NormalizeArgs<A>> between;
  for (const int b : {kAdd, kMul}) {
    if (!branches.has(b)) continue;
    const Branch& branch = branches.each[b];
    const auto vector = [&](Parameter which) { return scratch.template widened<T>(branch.parameters[which]); };
    const int64_t units = branch.hidden;
    const int64_t start = images * branches.hidden_before(b);
    A* hidden = result.normalized.data_ptr<A>() + start;
    first.push_back(linear_share<T>(branch.parameters[kW1], vector(kB1), state + 2, channels + 2, hidden, images, units,
                                    channels, Gate::kNone));
    between.push_back({hidden, result.inverse_deviation.data_ptr<A>() + branches.row(b) * images, vector(kNormWeight),
                       vector(kNormBias), activated + start, units, eps, kinds.activation});
    second.push_back(linear_share<T>(branch.parameters[kW2], vector(kB2), activated + start, units, applied[b], images,
                                     channels, units, kinds.of(b)));
  }
  run_together(first);
  for (const NormalizeArgs<A>& args : between) kernels<A>().normalize(args, 0, images);
  run_together(second);

  result.out = x.like();
  run(BroadcastArgs<T>{x.shape, x.tensor.data_ptr<T>(), applied[kMul], applied[kAdd], result.out.data_ptr<T>(),
                       past_caches(x)});
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> global_context(
    const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias, at::TensorList add,
    at::TensorList mul, double eps, int64_t activation, int64_t gate) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, mask_bias, x);
  check_epsilon(eps);
  const Branches branches(add, mul, x);
  Forward result;
  dispatch(x.scalar_type(), [&](auto zero) {
    result = run_forward<decltype(zero)>(map, mask_weight, mask_bias, branches, eps, Kinds(activation, gate));
  });
  return {result.out, result.logits, result.state, result.normalized, result.inverse_deviation, result.scale};
}

// What a call of the backward operator is about.
struct Backward {
  const FeatureMap& map;  // of x, or of grad where x is None
  const Tensor& grad;     // in the layout of map
  const OptionalTensor& mask_weight;
  const Branches& branches;
  const Kinds& kinds;
  const Needs& needs;
  const Tensor& logits;
  const Tensor& state;
  const Tensor& normalized;
  const Tensor& inverse_deviation;
  const Tensor& scale;

  bool runs(int b) const { return needs.branch(branches, b); }
};

// The gradients of the transforms' results before the gate, [N, C] each; null where no transform is.
template <typename A>
using TermGradients = std::array<A*, 2>;

template <typename T>
TermGradients<acc_t<T>> reduce_grad(const Backward& problem, Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const bool add = problem.runs(kAdd), mul = problem.runs(kMul);
  const FeatureMap& map = problem.map;
  const Shape shape = streaming(map.shape);
  const Plan plan = make_plan(shape, sizeof(T));
  const int64_t count = shape.images * shape.channels;
  TermGradients<A> grads{add ? scratch.take(plan.splits * count) : nullptr,
                         mul ? scratch.take(plan.splits * count) : nullptr};
  run(BroadcastBackwardArgs<T>{shape, plan, problem.grad.data_ptr<T>(), mul ? map.tensor.data_ptr<T>() : nullptr,
                               nullptr, nullptr, grads[kMul], grads[kAdd]});
  for (A*& grad : grads) {
    if (!grad || plan.splits == 1) continue;
    const A* parts = grad;
    grad = scratch.take(count);
    run<T>(ReduceArgs<A>{parts, grad, shape.images, plan.splits, shape.channels});
  }
  if (mul) kernels<A>().gate_backward(problem.kinds.gate, problem.scale.data_ptr<A>(), grads[kMul], count);
  return grads;
}

// The gradient of a parameter from that in the accumulation type.
template <typename T>
Tensor narrowed(const acc_t<T>* grad, const Tensor& parameter) {
  Tensor out = empty_gradient(parameter);
  const int64_t count = out.numel();
  with_weight<T>(out, [&](auto* data) {
    using P = std::remove_pointer_t<decltype(data)>;
    kernels<P>().narrow(grad, data, count);
  });
  return out;
}

// sum over the images of [N, width], as the gradient of a parameter
template <typename T>
Tensor summed(const acc_t<T>* grads, int64_t images, const Tensor& parameter, Scratch<acc_t<T>>& scratch) {
  acc_t<T>* sum = scratch.take(parameter.numel());
  run<T>(ReduceArgs<acc_t<T>>{grads, sum, 1, images, parameter.numel()});
  return narrowed<T>(sum, parameter);
}

// Fills in the gradients of the parameters; returns that of the context, [N, C], or null where it is not needed.
template <typename T>
const acc_t<T>* run_transform_backward(const Backward& problem, const TermGradients<acc_t<T>>& terms,
                                       std::vector<Tensor>& grads, Scratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const int64_t images = problem.map.shape.images, channels = problem.map.shape.channels;
  const bool needs_context = problem.needs.context();
  const auto fresh = [&](int b, Parameter which) {
    const Tensor& parameter = problem.branches.each[b].parameters[which];
    Tensor& grad = grads[Needs::index(b, which)];
    if (problem.needs.parameter(b, which)) grad = empty_gradient(parameter);
    return problem.needs.parameter(b, which) ? grad : Tensor();
  };

  // A vector's gradient as it is summed, and then in its own type.
  std::vector<std::tuple<int, Parameter, const A*>> sums;
  const auto sum_of = [&](int b, Parameter which) -> A* {
    if (!problem.needs.parameter(b, which) || !problem.branches.each[b].parameters[which].defined()) return nullptr;
    A* sum = scratch.take(problem.branches.each[b].parameters[which].numel());
    sums.emplace_back(b, which, sum);
    return sum;
  };

  struct Live {
    int b;
    int64_t hidden;
    A* grad_parts;   // [chunks, N, P]
    A* grad_hidden;  // [N, P]
  };
  std::vector<Live> live;
  std::vector<Share> shares;
  for (const int b : {kAdd, kMul}) {
    if (!problem.runs(b)) continue;
    const Branch& branch = problem.branches.each[b];
    Live one{b, branch.hidden};
    A* activated = nullptr;
    if (problem.needs.parameter(b, kW2)) {
      activated = scratch.take(images * one.hidden);
      A* hidden = problem.normalized.data_ptr<A>() + images * problem.branches.hidden_before(b);
      kernels<A>().activate({hidden, nullptr, scratch.template widened<T>(branch.parameters[kNormWeight]),
                             scratch.template widened<T>(branch.parameters[kNormBias]), activated, one.hidden, 0,
                             problem.kinds.activation},
                            0, images);
    }
    if (problem.needs.activated(b)) {
      one.grad_parts = scratch.take(make_pieces(branch.parameters[kW2], channels).chunks * images * one.hidden);
    }
    shares.push_back(linear_backward_share<T>(branch.parameters[kW2], terms[b], activated, one.hidden, fresh(b, kW2),
                                              sum_of(b, kB2), one.grad_parts, images, channels));
    live.push_back(one);
  }
  run_together(shares);

  shares.clear();
  int64_t context_chunks = 0;
  for (Live& one : live) {
    if (!problem.needs.activated(one.b)) continue;
    const Branch& branch = problem.branches.each[one.b];
    const int64_t start = images * problem.branches.hidden_before(one.b);
    const int64_t chunks = make_pieces(branch.parameters[kW2], channels).chunks;
    one.grad_hidden = scratch.take(images * one.hidden);
    run<T>(ReduceArgs<A>{one.grad_parts, one.grad_hidden, 1, chunks, images * one.hidden});
    A* grad_weight = sum_of(one.b, kNormWeight);
    A* grad_bias = sum_of(one.b, kNormBias);
    kernels<A>().normalize_backward({problem.normalized.data_ptr<A>() + start,
                                     problem.inverse_deviation.data_ptr<A>() + problem.branches.row(one.b) * images,
                                     scratch.template widened<T>(branch.parameters[kNormWeight]),
                                     scratch.template widened<T>(branch.parameters[kNormBias]), one.grad_hidden,
                                     grad_weight ? grad_weight : scratch.take(one.hidden),
                                     grad_bias ? grad_bias : scratch.take(one.hidden), images, one.hidden,
                                     problem.kinds.activation});
    if (problem.needs.hidden(one.b)) context_chunks += make_pieces(branch.parameters[kW1], one.hidden).chunks;
  }

  A* context_parts = needs_context ? scratch.take(context_chunks * images * channels) : nullptr;
  int64_t chunk = 0;
  for (const Live& one : live) {
    if (!problem.needs.hidden(one.b)) continue;
    const Tensor& w1 = problem.branches.each[one.b].parameters[kW1];
    A* parts = needs_context ? context_parts + chunk * images * channels : nullptr;
    shares.push_back(linear_backward_share<T>(w1, one.grad_hidden, problem.state.data_ptr<A>() + 2, channels + 2,
                                              fresh(one.b, kW1), sum_of(one.b, kB1), parts, images, one.hidden));
    chunk += make_pieces(w1, one.hidden).chunks;
  }
  run_together(shares);
  for (const auto& [b, which, sum] : sums) {
    grads[Needs::index(b, which)] = narrowed<T>(sum, problem.branches.each[b].parameters[which]);
  }
  if (!needs_context || context_chunks == 1) return context_parts;
  A* grad_context = scratch.take(images * channels);
  run<T>(ReduceArgs<A>{context_parts, grad_context, 1, context_chunks, images * channels});
  return grad_context;
}

template <typename T>
void run_backward(const Backward& problem, std::vector<Tensor>& grads) {
  using A = acc_t<T>;
  if (!problem.runs(kAdd) && !problem.runs(kMul)) return;
  const FeatureMap& map = problem.map;
  const int64_t images = map.shape.images, channels = map.shape.channels, pixels = map.shape.pixels;
  Scratch<A> scratch(map.accumulation());
  const A* grad_context = run_transform_backward<T>(problem, reduce_grad<T>(problem, scratch), grads, scratch);
  if (!problem.needs.context()) return;
  const A* scale = problem.branches.has(kMul) ? problem.scale.data_ptr<A>() : nullptr;
  const bool needs_x = problem.needs.x();
  if (needs_x) grads[Needs::kX] = map.like();
  T* grad_x = needs_x ? grads[Needs::kX].data_ptr<T>() : nullptr;
  const T* grad = problem.grad.data_ptr<T>();
  if (!problem.mask_weight) {
    A* term = scratch.take(images * channels);
    const A share = A(1) / static_cast<A>(pixels);
    for (int64_t i = 0; i < images * channels; ++i) term[i] = grad_context[i] * share;
    run(BroadcastArgs<T>{map.shape, grad, scale, term, grad_x, past_caches(map)});
    return;
  }
  const Plan plan = make_plan(map.shape, sizeof(T));
  const bool needs_weight = problem.needs.mask_weight();
  const int64_t units = images * plan.splits;
  A* parts = needs_weight ? scratch.take(units * channels) : nullptr;
  A* attention = scratch.take(images * pixels);
  A* grad_logits = scratch.take(images * pixels);
  A* grad_logits_sums = scratch.take(units);
  run(PoolBackwardArgs<T>{map.shape, plan, grad_context, map.tensor.data_ptr<T>(), problem.logits.data_ptr<A>(),
                          problem.state.data_ptr<A>(), attention, grad_logits, grad_logits_sums, parts});
  if (needs_x) {
    run(GradXArgs<T>{map.shape, grad, scale, attention, grad_context, grad_logits,
                     scratch.template widened<T>(*problem.mask_weight), grad_x, past_caches(map)});
  }
  if (needs_weight) {
    grads[Needs::kMaskWeight] = summed<T>(parts, units, *problem.mask_weight, scratch);
  }
}

std::vector<Tensor> global_context_backward(const Tensor& grad, const OptionalTensor& x,
                                            const OptionalTensor& mask_weight, at::TensorList add, at::TensorList mul,
                                            const Tensor& logits, const Tensor& state, const Tensor& normalized,
                                            const Tensor& inverse_deviation, const Tensor& scale, int64_t activation,
                                            int64_t gate, std::array<bool, Needs::kCount> needed) {
  const FeatureMap map(x ? *x : grad, x ? "x" : "grad");
  const Tensor& like = map.tensor;
  check_like(grad, "grad", like);
  if (mask_weight) check_companion(*mask_weight, "mask_weight", like, map.shape.channels);
  const Branches branches(add, mul, like);
  const Kinds kinds(activation, gate);
  const Needs needs{needed, mask_weight.has_value()};
  check_saved(like, mask_weight.has_value(), branches, logits, state, normalized, inverse_deviation, scale);
  TORCH_CHECK(x || !needs.reads_x(branches),
              "x must be given for the gradients of x or mask_weight and for a mul branch, got None");
  const Tensor same_grad = grad.contiguous(map.format);
  const Backward problem{map,    same_grad, mask_weight, branches,          kinds, needs,
                         logits, state,     normalized,  inverse_deviation, scale};
  std::vector<Tensor> grads(Needs::kCount);
  dispatch(like.scalar_type(), [&](auto zero) { run_backward<decltype(zero)>(problem, grads); });
  for (Tensor& one : grads) {
    if (!one.defined()) one = at::empty({0}, like.options());
  }
  return grads;
}

}  // namespace

}  // namespace gc::cpu

TORCH_LIBRARY_IMPL(gc_cuda, CPU, m) {
  m.impl("global_context", &gc::cpu::global_context);
  m.impl("global_context_backward", &gc::cpu::global_context_backward);
}
