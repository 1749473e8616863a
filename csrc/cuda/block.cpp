// The whole block as one operator, on CUDA: three launches forward (pool, transform, broadcast), three backward (sums
// of grad, transform, one pass that reads x and grad and writes grad_x). One launch more each way where a map has more
// channels than a block of threads holds. Launches are planned before memory is allocated, which they then share.
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/binding.h"
#include "cuda/launch/planned.h"
#include "ops/branches.h"

namespace gc::cuda {

namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor contiguous(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->contiguous() : Tensor(); }

// Pieces of one allocation, in elements of the accumulation type. They are taken twice: counted, then had.
class Pieces {
 public:
  explicit Pieces(const FeatureMap& x) : element_bytes_(accumulation_bytes(x.type())) {}

  void* take(int64_t elements) {
    void* const taken = behind(start_, taken_, element_bytes_);
    taken_ += (elements + kAligned - 1) / kAligned * kAligned;
    return taken;
  }

  int64_t taken() const { return taken_; }
  void begin(void* start) {
    start_ = start;
    taken_ = 0;
  }

 private:
  static constexpr int64_t kAligned = 64;  // no two launches write one line of the cache

  int element_bytes_;
  void* start_ = nullptr;
  int64_t taken_ = 0;
};

// What a forward pass has kept, in memory.
struct KeptParts {
  void *state, *context, *logits, *normalized, *inverse_deviation, *scale;  // scale: null without mul

  KeptParts(void* memory, const Kept& kept, const FeatureMap& x, const Branches& branches) {
    const auto at = [&](int64_t start) { return behind(memory, start, accumulation_bytes(x.type())); };
    state = at(kept.state);
    context = at(kept.state + 2);  // an image's lies behind the two statistics of its state
    logits = at(kept.logits);
    normalized = at(kept.normalized);
    inverse_deviation = at(kept.inverse_deviation);
    scale = branches.has(kMul) ? at(kept.scale) : nullptr;
  }
};

// The branches that take part in a launch, as the launch plan sees them.
TransformProblem transform_problem(const FeatureMap& x, const Branches& branches, const std::vector<int>& live,
                                   bool pairs) {
  TransformProblem problem{x.images(), x.channels(), static_cast<int>(live.size()), {0, 0}, x.type(), pairs};
  for (size_t i = 0; i < live.size(); ++i) {
    const Branch& branch = branches.each[live[i]];
    problem.hidden[i] = branch.hidden;
    for (const Parameter which : {kW1, kW2}) {
      const Tensor& matrix = branch.parameters[which];
      const uintptr_t address = reinterpret_cast<uintptr_t>(matrix.data_ptr());
      problem.pairs = problem.pairs && address % (2 * matrix.element_size()) == 0;
    }
  }
  return problem;
}

TransformPlan transform_plan(TransformPass pass, const FeatureMap& x, const TransformProblem& problem,
                             TransformDepth depth) {
  try {
    return planned(pass, problem, x.device(), depth);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "the transform beside x of shape ", x.tensor().sizes(), " is too large: ", error.what());
  }
}

std::vector<int> present_branches(const Branches& branches) {
  std::vector<int> present;
  for (const int b : {kAdd, kMul}) {
    if (branches.has(b)) present.push_back(b);
  }
  return present;
}

class TransformForward {
 public:
  // The context begins where memory does, but for two elements: in pairs.
  TransformForward(const FeatureMap& x, const Branches& branches)
      : x_(x),
        branches_(branches),
        live_(present_branches(branches)),
        problem_(transform_problem(x, branches, live_, true)),
        plan_(transform_plan(TransformPass::kForward, x, problem_, TransformDepth::kContext)) {}

  Wanted wanted() const { return {plan_.workspace, plan_.counters}; }

  // outs: [N, C] of each branch.
  void launch(Kinds kinds, double eps, const KeptParts& kept, const std::array<void*, 2>& outs, void* workspace,
              unsigned* counters) const {
    const int64_t bytes = accumulation_bytes(x_.type());
    TransformForwardArgs args{};
    args.counters = counters;
    args.images = static_cast<int>(x_.images());
    args.channels = static_cast<int>(x_.channels());
    args.branches = problem_.branches;
    args.eps = eps;
    args.activation = kinds.activation;
    args.context = kept.context;
    args.context_stride = x_.channels() + 2;
    for (size_t i = 0; i < live_.size(); ++i) {
      const int b = live_[i];
      const Branch& branch = branches_.each[b];
      const auto given = [&](Parameter which) { return companion(branch.parameters[which], x_.tensor()); };
      const int64_t before = branches_.hidden_before(b) * x_.images();
      args.branch[i] = {static_cast<int>(branch.hidden),
                        given(kW1),
                        given(kB1),
                        given(kNormWeight),
                        given(kNormBias),
                        given(kW2),
                        given(kB2),
                        kinds.of(b),
                        behind(workspace, before, bytes),
                        behind(kept.normalized, before, bytes),
                        behind(kept.inverse_deviation, branches_.row(b) * x_.images(), bytes),
                        outs[b]};
    }
    C10_CUDA_CHECK(launch_transform_forward(plan_, args, x_.stream()));
  }

 private:
  const FeatureMap& x_;
  const Branches& branches_;
  std::vector<int> live_;
  TransformProblem problem_;
  TransformPlan plan_;
};

// out, and what is kept for the backward pass; without `keep` that lies in the scratch memory.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                   at::TensorList add, at::TensorList mul, double eps, int64_t activation, int64_t gate,
                                   bool keep) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, mask_bias, x);
  check_epsilon(eps);
  const Branches branches(add, mul, x);
  const Kinds kinds(activation, gate);
  const bool attention = mask_weight.has_value();
  const Kept layout(map.images(), map.channels(), map.pixels(), attention, branches);
  const Tensor out = map.empty_like();
  const Tensor memory = keep ? map.empty_accumulation({layout.elements}) : Tensor();
  if (map.images() == 0) return {out, memory};

  const PoolForward pool(map, attention ? Weighting::kMask : Weighting::kUniform);
  const TransformForward transform(map, branches);
  Pieces pieces(map);
  void *own, *term, *pool_workspace, *transform_workspace;
  const auto lay_out = [&] {
    own = keep ? nullptr : pieces.take(layout.elements);
    term = branches.has(kAdd) ? pieces.take(map.images() * map.channels()) : nullptr;
    pool_workspace = pieces.take(pool.wanted().workspace);
    transform_workspace = pieces.take(transform.wanted().workspace);
  };
  lay_out();
  const Tensor scratch = map.empty_accumulation({pieces.taken()});
  pieces.begin(scratch.data_ptr());
  lay_out();
  const KeptParts kept(keep ? memory.data_ptr() : own, layout, map, branches);
  const Counters counters = map.tickets(std::max(pool.wanted().tickets, transform.wanted().tickets));

  const Tensor weight = contiguous(mask_weight);
  PoolForwardArgs args{};
  if (attention) {
    args.mask_weight = companion(weight, map.tensor());
    args.mask_bias = companion(mask_bias.value_or(Tensor()), map.tensor());
    args.logits = kept.logits;
  }
  args.factor = attention ? 1.0 : 1.0 / static_cast<double>(map.pixels());
  args.state = kept.state;
  pool.launch(args, pool_workspace, counters.get());
  transform.launch(kinds, eps, kept, {term, kept.scale}, transform_workspace, counters.get());
  launch_broadcast(map, wide(kept.scale), wide(term), out.data_ptr());
  return {out, memory};
}

Tensor global_context(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                      at::TensorList add, at::TensorList mul, double eps, int64_t activation, int64_t gate) {
  return std::get<0>(forward(x, mask_weight, mask_bias, add, mul, eps, activation, gate, false));
}

std::tuple<Tensor, Tensor> global_context_kept(const Tensor& x, const OptionalTensor& mask_weight,
                                               const OptionalTensor& mask_bias, at::TensorList add, at::TensorList mul,
                                               double eps, int64_t activation, int64_t gate) {
  return forward(x, mask_weight, mask_bias, add, mul, eps, activation, gate, true);
}

TransformDepth depth_of(const Needs& needs, const std::vector<int>& live) {
  if (needs.context()) return TransformDepth::kContext;
  const bool deep = std::any_of(live.begin(), live.end(), [&](int b) { return needs.activated(b); });
  return deep ? TransformDepth::kParameters : TransformDepth::kLastLayer;
}

std::vector<int> needed_branches(const Branches& branches, const Needs& needs) {
  std::vector<int> live;
  for (const int b : {kAdd, kMul}) {
    if (needs.branch(branches, b)) live.push_back(b);
  }
  return live;
}

class TransformBackward {
 public:
  using Gradients = BackwardProblem::Gradients;

  TransformBackward(const FeatureMap& x, const BackwardProblem& of, bool pairs)
      : x_(x),
        of_(of),
        live_(needed_branches(of.branches, of.needs)),
        problem_(transform_problem(x, of.branches, live_, pairs)),
        plan_(transform_plan(TransformPass::kBackward, x, problem_, depth_of(of.needs, live_))) {}

  Wanted wanted() const { return {plan_.workspace, plan_.counters}; }

  // The gradients of the branches' parameters and, as 0, that of the mask's bias into `grads`, and that of the context
  // times `factor` into grad_context (if there is one). grad_outs: [N, C] of each branch.
  void launch(Kinds kinds, double factor, const KeptParts& kept, const std::array<void*, 2>& grad_outs,
              void* grad_context, const Gradients& grads, void* workspace, unsigned* counters) const {
    const int64_t bytes = accumulation_bytes(x_.type());
    TransformBackwardArgs args{};
    args.counters = counters;
    args.images = static_cast<int>(x_.images());
    args.channels = static_cast<int>(x_.channels());
    args.branches = problem_.branches;
    args.context = kept.context;
    args.context_stride = x_.channels() + 2;
    args.factor = factor;
    args.activation = kinds.activation;
    args.grad_context = grad_context;
    args.zero = companion_out(grads[Needs::kMaskBias], x_.tensor());
    int64_t taken = 0;
    const auto take = [&](int64_t elements) {
      void* const start = behind(workspace, taken, bytes);
      taken += elements;
      return start;
    };
    for (size_t i = 0; i < live_.size(); ++i) {
      const int b = live_[i];
      const Branch& branch = of_.branches.each[b];
      const auto given = [&](Parameter which) { return companion(branch.parameters[which], x_.tensor()); };
      const auto out = [&](Parameter which) { return companion_out(grads[Needs::index(b, which)], x_.tensor()); };
      const int64_t before = of_.branches.hidden_before(b) * x_.images();
      const TransformWorkspace own = backward_workspace(problem_, plan_, static_cast<int>(i));
      args.branch[i] = {static_cast<int>(branch.hidden),
                        given(kW1),
                        given(kNormWeight),
                        given(kNormBias),
                        given(kW2),
                        behind(kept.normalized, before, bytes),
                        behind(kept.inverse_deviation, of_.branches.row(b) * x_.images(), bytes),
                        grad_outs[b],
                        kinds.of(b),
                        b == kMul ? kept.scale : nullptr,
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
    C10_CUDA_CHECK(launch_transform_backward(plan_, args, x_.stream()));
  }

 private:
  const FeatureMap& x_;
  const BackwardProblem& of_;
  std::vector<int> live_;
  TransformProblem problem_;
  TransformPlan plan_;
};

// The gradients of the branches' outputs, [N, C]: sums over the pixels of grad, and of grad * x.
class SumGradients {
 public:
  SumGradients(const FeatureMap& x, const FeatureMap& grad, bool mul) : grad_(grad) {
    if (mul) {
      products_.emplace(x, grad.tensor().data_ptr(), nullptr);
    } else {
      sums_.emplace(grad, Weighting::kUniform);
    }
  }

  Wanted wanted() const { return products_ ? products_->wanted() : sums_->wanted(); }

  // Null for what is not needed.
  void launch(void* of_add, void* of_mul, void* workspace, unsigned* tickets) const {
    if (products_) {
      BroadcastMulBackwardArgs args{};
      args.grad = grad_.tensor().data_ptr();
      args.grad_scale = wide_out(of_mul);
      args.grad_term = wide_out(of_add);
      return products_->launch(args, workspace, tickets);
    }
    PoolForwardArgs args{};
    args.factor = 1;
    args.context = wide_out(of_add);
    sums_->launch(args, workspace, tickets);
  }

 private:
  const FeatureMap& grad_;
  std::optional<BroadcastMulBackward> products_;
  std::optional<PoolForward> sums_;
};

std::vector<Tensor> global_context_backward(const Tensor& grad, const OptionalTensor& x,
                                            const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                            at::TensorList add, at::TensorList mul, const Tensor& kept_before,
                                            int64_t activation, int64_t gate, std::array<bool, Needs::kCount> needed) {
  const bool attention = mask_weight.has_value();
  const FeatureMap map(x.has_value() ? *x : grad, x.has_value() ? "x" : "grad");
  const BackwardProblem problem(grad, x, mask_weight, mask_bias, add, mul, kept_before, map.tensor(), needed);
  const Needs& needs = problem.needs;
  const Branches& branches = problem.branches;
  const Kinds kinds(activation, gate);

  BackwardProblem::Gradients grads = problem.empty_gradients();
  if (needs.x()) grads[Needs::kX] = map.empty_like();
  const bool with_add = needs.branch(branches, kAdd), with_mul = needs.branch(branches, kMul);
  if (map.images() == 0 || !(with_add || with_mul)) {
    for (const Tensor& one : grads) {
      if (one.defined()) one.zero_();
    }
    return problem.only_needed(grads);
  }

  const FeatureMap own_grad(map.in_my_layout(grad), "grad");
  const KeptParts kept(kept_before.data_ptr(), problem.kept, map, branches);
  const SumGradients sum(map, own_grad, with_mul);
  const bool pairs = reinterpret_cast<uintptr_t>(kept.context) % (2 * accumulation_bytes(map.type())) == 0;
  const TransformBackward transform(map, problem, pairs);
  std::optional<PoolBackward> pool;
  if (attention && needs.context()) {
    pool.emplace(PoolGradient::kBlock, map, pointer(grads[Needs::kX]), own_grad.tensor().data_ptr());
  }
  const Wanted of_pool = pool ? pool->wanted() : Wanted{};

  const int64_t per_channel = map.images() * map.channels();
  Pieces pieces(map);
  void *of_add, *of_mul, *grad_context, *sum_workspace, *transform_workspace, *pool_workspace;
  const auto lay_out = [&] {
    of_add = with_add ? pieces.take(per_channel) : nullptr;
    of_mul = with_mul ? pieces.take(per_channel) : nullptr;
    grad_context = needs.context() ? pieces.take(per_channel) : nullptr;
    sum_workspace = pieces.take(sum.wanted().workspace);
    transform_workspace = pieces.take(transform.wanted().workspace);
    pool_workspace = pieces.take(of_pool.workspace);
  };
  lay_out();
  const Tensor scratch = map.empty_accumulation({pieces.taken()});
  pieces.begin(scratch.data_ptr());
  lay_out();
  const Counters counters = map.tickets(std::max({sum.wanted().tickets, transform.wanted().tickets, of_pool.tickets}));

  sum.launch(of_add, of_mul, sum_workspace, counters.get());
  transform.launch(kinds, attention ? 1.0 : 1.0 / static_cast<double>(map.pixels()), kept, {of_add, of_mul},
                   grad_context, grads, transform_workspace, counters.get());
  if (pool) {
    const Tensor weight = contiguous(mask_weight);
    PoolBackwardArgs args{};
    args.grad = own_grad.tensor().data_ptr();
    args.scale = wide(kept.scale);
    args.grad_context = wide(grad_context);
    args.mask_weight = companion(weight, map.tensor());
    args.logits = wide(kept.logits);
    args.state = kept.state;
    args.grad_x = pointer(grads[Needs::kX]);
    args.grad_weight = companion_out(grads[Needs::kMaskWeight], map.tensor());
    pool->launch(args, pool_workspace, counters.get());
  } else if (needs.context()) {
    launch_broadcast(own_grad, wide(kept.scale), wide(grad_context), grads[Needs::kX].data_ptr());
  }
  return problem.only_needed(grads);
}

}  // namespace

TORCH_LIBRARY_IMPL(gc_cuda, CUDA, m) {
  m.impl("global_context", global_context);
  m.impl("global_context_kept", global_context_kept);
  m.impl("global_context_backward", global_context_backward);
}

}  // namespace gc::cuda
