// The whole block as one operator, on CUDA: three launches forward (pool, transform, broadcast), three backward (sums
// of grad, transform, one pass that reads x and grad and writes grad_x). One launch more each way where a map has more
// channels than a block of threads holds.
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "branches.h"
#include "cuda/binding.h"

namespace gc::cuda {

namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor contiguous(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->contiguous() : Tensor(); }

// The branches that take part in a launch, as the launch plan sees them.
TransformProblem transform_problem(const FeatureMap& x, const Branches& branches, const std::vector<int>& live,
                                   const void* context) {
  TransformProblem problem{
      x.images(), x.channels(), static_cast<int>(live.size()), {0, 0}, element_type(x.tensor().scalar_type()), true};
  const auto in_pairs = [](const void* address, size_t element_bytes) {
    return reinterpret_cast<uintptr_t>(address) % (2 * element_bytes) == 0;
  };
  problem.pairs = in_pairs(context, accumulation_bytes(problem.type));
  for (size_t i = 0; i < live.size(); ++i) {
    const Branch& branch = branches.each[live[i]];
    problem.hidden[i] = branch.hidden;
    for (const Parameter which : {kW1, kW2}) {
      const Tensor& matrix = branch.parameters[which];
      problem.pairs = problem.pairs && in_pairs(matrix.data_ptr(), matrix.element_size());
    }
  }
  return problem;
}

// Calls make(problem), with what is wrong as an error about x.
template <typename Make>
TransformPlan planned(const FeatureMap& x, const Make& make) {
  try {
    return make();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "the transform beside x of shape ", x.tensor().sizes(), " is too large: ", error.what());
  }
}

// From row `first` of a [.., width] accumulation-type tensor on.
template <typename Int>
void* rows_from(const Tensor& tensor, Int first, int64_t width) {
  return static_cast<char*>(tensor.data_ptr()) + first * width * tensor.element_size();
}

// An image's context lies behind the two statistics of its state.
void* context_in(const Tensor& state) { return rows_from(state, 2, 1); }

// outs: [N, C] of each branch.
void run_transform_forward(const FeatureMap& x, const Branches& branches, Kinds kinds, const Tensor& state, double eps,
                           const Tensor& normalized, const Tensor& inverse_deviation,
                           const std::array<Tensor, 2>& outs) {
  std::vector<int> live;
  for (const int b : {kAdd, kMul}) {
    if (branches.has(b)) live.push_back(b);
  }
  const TransformProblem problem = transform_problem(x, branches, live, context_in(state));
  const TransformPlan plan = planned(x, [&] { return make_transform_forward_plan(problem, x.limits()); });
  const Tensor products = x.empty_accumulation({plan.workspace});
  const Counters counters = x.tickets(plan.counters);
  TransformForwardArgs args{};
  args.counters = ticket_pointer(counters);
  args.images = static_cast<int>(x.images());
  args.channels = static_cast<int>(x.channels());
  args.branches = problem.branches;
  args.eps = eps;
  args.activation = kinds.activation;
  args.context = context_in(state);
  args.context_stride = x.channels() + 2;
  for (size_t i = 0; i < live.size(); ++i) {
    const int b = live[i];
    const Branch& branch = branches.each[b];
    const auto given = [&](Parameter which) { return companion(branch.parameters[which], x.tensor()); };
    args.branch[i] = {static_cast<int>(branch.hidden),
                      given(kW1),
                      given(kB1),
                      given(kNormWeight),
                      given(kNormBias),
                      given(kW2),
                      given(kB2),
                      kinds.of(b),
                      rows_from(products, branches.hidden_before(b), x.images()),
                      rows_from(normalized, branches.hidden_before(b), x.images()),
                      rows_from(inverse_deviation, branches.row(b), x.images()),
                      outs[b].data_ptr()};
  }
  C10_CUDA_CHECK(launch_transform_forward(plan, args, x.stream()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> global_context(
    const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias, at::TensorList add,
    at::TensorList mul, double eps, int64_t activation, int64_t gate) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, mask_bias, x);
  check_epsilon(eps);
  const Branches branches(add, mul, x);
  const int64_t images = map.images(), channels = map.channels();
  const bool attention = mask_weight.has_value();

  const Tensor out = map.empty_like();
  const Tensor logits = attention ? map.empty_accumulation({images, map.pixels()}) : map.empty_accumulation({0});
  const Tensor state = map.empty_accumulation({images, channels + 2});
  const Tensor normalized = map.empty_accumulation({images * branches.hidden()});
  const Tensor inverse_deviation = map.empty_accumulation({branches.count(), images});
  const Tensor scale = branches.has(kMul) ? map.empty_accumulation({images, channels}) : map.empty_accumulation({0});
  if (images > 0) {
    const Tensor term = branches.has(kAdd) ? map.empty_accumulation({images, channels}) : Tensor();
    if (attention) {
      run_pool(map, Weighting::kMask, mask_weight->contiguous(), contiguous(mask_bias), 1, {{}, logits, state});
    } else {
      run_pool(map, Weighting::kUniform, {}, {}, 1.0 / static_cast<double>(map.pixels()), {{}, {}, state});
    }
    run_transform_forward(map, branches, Kinds(activation, gate), state, eps, normalized, inverse_deviation,
                          {term, scale});
    run_broadcast(map, branches.has(kMul) ? scale : Tensor(), term, out);
  }
  return {out, logits, state, normalized, inverse_deviation, scale};
}

// What the forward pass left behind.
struct Saved {
  const Tensor &logits, &state, &normalized, &inverse_deviation, &scale;
};

// Gradients of the branches' parameters into `grads`, and that of the context times `factor` into grad_context (if
// defined). grad_outs: [N, C] of each branch.
void run_transform_backward(const FeatureMap& x, const Branches& branches, Kinds kinds, const Needs& needs,
                            const Saved& saved, const std::array<Tensor, 2>& grad_outs, double factor,
                            const Tensor& grad_context, const std::vector<Tensor>& grads) {
  std::vector<int> live;
  TransformDepth depth = TransformDepth::kLastLayer;
  for (const int b : {kAdd, kMul}) {
    if (!needs.branch(branches, b)) continue;
    live.push_back(b);
    if (needs.activated(b)) depth = TransformDepth::kParameters;
  }
  if (needs.context()) depth = TransformDepth::kContext;
  const TransformProblem problem = transform_problem(x, branches, live, context_in(saved.state));
  const TransformPlan plan = planned(x, [&] { return make_transform_backward_plan(problem, x.limits(), depth); });
  const Tensor workspace = x.empty_accumulation({plan.workspace});
  const Counters counters = x.tickets(plan.counters);
  TransformBackwardArgs args{};
  args.counters = ticket_pointer(counters);
  args.images = static_cast<int>(x.images());
  args.channels = static_cast<int>(x.channels());
  args.branches = problem.branches;
  args.context = context_in(saved.state);
  args.context_stride = x.channels() + 2;
  args.factor = factor;
  args.activation = kinds.activation;
  args.grad_context = pointer(grad_context);
  int64_t taken = 0;
  const auto take = [&](int64_t elements) {
    void* const start = rows_from(workspace, taken, 1);
    taken += elements;
    return start;
  };
  for (size_t i = 0; i < live.size(); ++i) {
    const int b = live[i];
    const Branch& branch = branches.each[b];
    const auto given = [&](Parameter which) { return companion(branch.parameters[which], x.tensor()); };
    const auto out = [&](Parameter which) {
      return needs.parameter(b, which) && branch.parameters[which].defined()
                 ? companion_out(grads[Needs::index(b, which)], x.tensor())
                 : CompanionOut{};
    };
    const TransformWorkspace own = backward_workspace(problem, plan, static_cast<int>(i));
    args.branch[i] = {static_cast<int>(branch.hidden),
                      given(kW1),
                      given(kNormWeight),
                      given(kNormBias),
                      given(kW2),
                      rows_from(saved.normalized, branches.hidden_before(b), x.images()),
                      rows_from(saved.inverse_deviation, branches.row(b), x.images()),
                      grad_outs[b].data_ptr(),
                      kinds.of(b),
                      b == kMul ? saved.scale.data_ptr() : nullptr,
                      out(kW1),
                      out(kB1),
                      out(kNormWeight),
                      out(kNormBias),
                      out(kW2),
                      out(kB2),
                      take(own.partial_y),
                      take(own.grad_y),
                      take(own.grad_hidden),
                      take(own.partial_context)};
  }
  C10_CUDA_CHECK(launch_transform_backward(plan, args, x.stream()));
}

// The gradients of the branches' outputs, [N, C]: sums over the pixels of grad, and of grad * x.
std::array<Tensor, 2> sum_gradients(const FeatureMap& x, const Tensor& grad, bool add, bool mul) {
  std::array<Tensor, 2> sums;
  if (add) sums[kAdd] = x.empty_accumulation({x.images(), x.channels()});
  if (mul) {
    sums[kMul] = x.empty_accumulation({x.images(), x.channels()});
    run_broadcast_mul_backward(x, grad, {}, {{}, sums[kMul], sums[kAdd]});
  } else {
    run_pool(FeatureMap(grad, "grad"), Weighting::kUniform, {}, {}, 1, {sums[kAdd], {}, {}});
  }
  return sums;
}

std::vector<Tensor> global_context_backward(const Tensor& grad, const OptionalTensor& x,
                                            const OptionalTensor& mask_weight, at::TensorList add, at::TensorList mul,
                                            const Tensor& logits, const Tensor& state, const Tensor& normalized,
                                            const Tensor& inverse_deviation, const Tensor& scale, int64_t activation,
                                            int64_t gate, std::array<bool, Needs::kCount> needed) {
  const bool attention = mask_weight.has_value();
  const FeatureMap map(x.has_value() ? *x : grad, x.has_value() ? "x" : "grad");
  const Tensor& like = map.tensor();
  check_like(grad, "grad", like);
  if (attention) check_companion(*mask_weight, "mask_weight", like, map.channels());
  const Branches branches(add, mul, like);
  check_saved(like, attention, branches, logits, state, normalized, inverse_deviation, scale);
  const Needs needs{needed, attention};
  TORCH_CHECK(x.has_value() || !needs.reads_x(branches),
              "x must be given for the gradients of x or mask_weight and for a mul branch, got None");

  std::vector<Tensor> grads(Needs::kCount);
  for (Tensor& one : grads) one = at::empty({0}, like.options());
  const auto want = [&](int index, const Tensor& parameter) {
    grads[index] = empty_gradient(parameter);
    if (map.images() == 0) grads[index].zero_();
  };
  if (needs.x()) grads[Needs::kX] = map.empty_like();
  if (needs.mask_weight()) want(Needs::kMaskWeight, *mask_weight);
  for (const int b : {kAdd, kMul}) {
    for (const Parameter which : {kW1, kB1, kNormWeight, kNormBias, kW2, kB2}) {
      const Tensor& parameter = branches.each[b].parameters[which];
      if (parameter.defined() && needs.parameter(b, which)) want(Needs::index(b, which), parameter);
    }
  }
  const bool with_add = needs.branch(branches, kAdd), with_mul = needs.branch(branches, kMul);
  if (map.images() == 0 || !(with_add || with_mul)) return grads;

  const Tensor same_grad = map.in_my_layout(grad);
  const std::array<Tensor, 2> grad_outs = sum_gradients(map, same_grad, with_add, with_mul);
  const Tensor grad_context = needs.context() ? map.empty_accumulation({map.images(), map.channels()}) : Tensor();
  run_transform_backward(map, branches, Kinds(activation, gate), needs,
                         {logits, state, normalized, inverse_deviation, scale}, grad_outs,
                         attention ? 1.0 : 1.0 / static_cast<double>(map.pixels()), grad_context, grads);
  if (!needs.context()) return grads;

  const Tensor given_scale = branches.has(kMul) ? scale : Tensor();
  if (attention) {
    run_pool_backward(
        PoolGradient::kBlock, map, {grad_context, mask_weight->contiguous(), logits, state, same_grad, given_scale},
        {needs.x() ? grads[Needs::kX] : Tensor(), {}, needs.mask_weight() ? grads[Needs::kMaskWeight] : Tensor()});
  } else {
    run_broadcast(FeatureMap(same_grad, "grad"), given_scale, grad_context, grads[Needs::kX]);
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(gc_cuda, CUDA, m) {
  m.impl("global_context", global_context);
  m.impl("global_context_backward", global_context_backward);
}

}  // namespace gc::cuda
