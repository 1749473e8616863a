// The backward pass of the whole block as one operator: grad is read (with mul x along with it), then x, then grad
// again, and grad_x is written.
#include <torch/library.h>

#include <array>
#include <utility>
#include <vector>

#include "cpu/block.h"

namespace gc::cpu {

namespace {

using Gradients = BackwardProblem::Gradients;

// The gradients of a branch: those on the way, and sums of parameters' gradients before they are narrowed.
template <typename A>
struct BranchGradients {
  A *split_terms, *term;     // of the transform's result before the gate: [splits, N, C] where it is split, [N, C]
  A* activated;              // [N, P]
  A *hidden_parts, *hidden;  // [chunks, N, P], [N, P]
  A *b1, *norm_weight, *norm_bias, *b2;
};

// What a backward call is about, and its intermediate results. Null is what is not needed.
template <typename T>
struct Backward {
  using A = acc_t<T>;

  const FeatureMap& map;  // of x, or of grad where x is None
  const Tensor& grad;     // in the layout of map
  const Branches& branches;
  const Needs& needs;
  Kinds kinds;
  bool attention;
  Widened<T> mask_weight;
  std::array<WidenedVectors<T>, 2> vectors;
  Shape sum_shape;  // of the sums over grad, for which planes are taken in small groups
  Plan sum_plan, plan;
  std::array<BranchGradients<A>, 2> of{};
  A *context_parts = nullptr, *context = nullptr;  // [chunks, N, C] of both branches, [N, C]
  A *weight_parts = nullptr, *weight_sum = nullptr;
  A *attentions = nullptr, *logits = nullptr, *logit_sums = nullptr;

  Backward(const FeatureMap& of_map, const Tensor& same_grad, const Tensor& weight, const Branches& given,
           const Needs& wanted, Kinds which)
      : map(of_map),
        grad(same_grad),
        branches(given),
        needs(wanted),
        kinds(which),
        attention(weight.defined()),
        mask_weight(weight),
        vectors{WidenedVectors<T>(given.each[kAdd]), WidenedVectors<T>(given.each[kMul])},
        sum_shape(streaming(map.shape)),
        sum_plan(make_plan(sum_shape, sizeof(T))),
        plan(make_plan(map.shape, sizeof(T))) {}

  bool runs(int b) const { return needs.branch(branches, b); }
  int64_t chunks(int b, Parameter which, int64_t rows) const {
    return make_pieces(branches.each[b].parameters[which], rows).chunks;
  }
  int64_t context_chunks() const {
    int64_t chunks_of_both = 0;
    for (const int b : {kAdd, kMul}) {
      if (runs(b) && needs.hidden(b)) chunks_of_both += chunks(b, kW1, branches.each[b].hidden);
    }
    return chunks_of_both;
  }

  void take_from(Scratch<A>& scratch) {
    const int64_t images = map.shape.images, channels = map.shape.channels, pixels = map.shape.pixels;
    for (const int b : {kAdd, kMul}) {
      if (!runs(b)) continue;
      BranchGradients<A>& grads = of[b];
      const int64_t units = branches.each[b].hidden;
      const auto sum = [&](Parameter which, int64_t count) {
        return needs.parameter(b, which) ? scratch.take(count) : nullptr;
      };
      grads.term = scratch.take(images * channels);
      grads.split_terms = sum_plan.splits > 1 ? scratch.take(sum_plan.splits * images * channels) : grads.term;
      grads.b2 = sum(kB2, channels);
      vectors[b].take_from(scratch);
      if (needs.parameter(b, kW2)) grads.activated = scratch.take(images * units);
      if (!needs.activated(b)) continue;
      grads.hidden_parts = scratch.take(chunks(b, kW2, channels) * images * units);
      grads.hidden = scratch.take(images * units);
      // These two are summed whoever needs them.
      grads.norm_weight = scratch.take(units);
      grads.norm_bias = scratch.take(units);
      grads.b1 = sum(kB1, units);
    }
    if (!needs.context()) return;
    context_parts = scratch.take(context_chunks() * images * channels);
    context = context_chunks() > 1 ? scratch.take(images * channels) : context_parts;
    if (!attention) return;
    mask_weight.take_from(scratch);
    if (needs.mask_weight()) {
      weight_parts = scratch.take(images * plan.splits * channels);
      weight_sum = scratch.take(channels);
    }
    attentions = scratch.take(images * pixels);
    logits = scratch.take(images * pixels);
    logit_sums = scratch.take(images * plan.splits);
  }
};

// The gradients of the transforms' results before the gate, [N, C] each.
template <typename T>
void reduce_grad(const Backward<T>& call, const KeptParts<acc_t<T>>& kept) {
  using A = acc_t<T>;
  const FeatureMap& map = call.map;
  const int64_t count = map.shape.images * map.shape.channels;
  const std::array<BranchGradients<A>, 2>& of = call.of;
  run(BroadcastBackwardArgs<T>{call.sum_shape, call.sum_plan, call.grad.template data_ptr<T>(),
                               call.runs(kMul) ? map.tensor.template data_ptr<T>() : nullptr, nullptr, nullptr,
                               of[kMul].split_terms, of[kAdd].split_terms});
  for (const BranchGradients<A>& one : of) {
    if (!one.term || one.split_terms == one.term) continue;
    run<T>(
        ReduceArgs<A>{one.split_terms, one.term, call.sum_shape.images, call.sum_plan.splits, call.sum_shape.channels});
  }
  if (of[kMul].term) kernels<A>().gate_backward(call.kinds.gate, kept.scale, of[kMul].term, count);
}

// The gradients of W2 and b2, and that of the activated hidden units.
template <typename T>
void last_layer_backward(const Backward<T>& call, const KeptParts<acc_t<T>>& kept, Gradients& grads) {
  using A = acc_t<T>;
  const int64_t images = call.map.shape.images, channels = call.map.shape.channels;
  Shares shares;
  for (const int b : {kAdd, kMul}) {
    if (!call.runs(b)) continue;
    const Branch& branch = call.branches.each[b];
    const BranchGradients<A>& of = call.of[b];
    if (of.activated) {
      A* hidden = kept.normalized + images * call.branches.hidden_before(b);
      kernels<A>().activate({hidden, nullptr, call.vectors[b].norm_weight.get(), call.vectors[b].norm_bias.get(),
                             of.activated, branch.hidden, 0, call.kinds.activation},
                            0, images);
    }
    shares.push_back(linear_backward_share<T>(branch.parameters[kW2], of.term, of.activated, branch.hidden,
                                              grads[Needs::index(b, kW2)], of.b2, of.hidden_parts, images, channels));
  }
  run_together(shares);
}

// The gradients of the norm's weight and bias, of W1 and b1, and that of the context.
template <typename T>
void first_layer_backward(const Backward<T>& call, const KeptParts<acc_t<T>>& kept, Gradients& grads) {
  using A = acc_t<T>;
  const int64_t images = call.map.shape.images, channels = call.map.shape.channels;
  Shares shares;
  A* context_part = call.context_parts;
  for (const int b : {kAdd, kMul}) {
    if (!call.runs(b) || !call.needs.activated(b)) continue;
    const Branch& branch = call.branches.each[b];
    const BranchGradients<A>& of = call.of[b];
    run<T>(ReduceArgs<A>{of.hidden_parts, of.hidden, 1, call.chunks(b, kW2, channels), images * branch.hidden});
    kernels<A>().normalize_backward({kept.normalized + images * call.branches.hidden_before(b),
                                     kept.inverse_deviation + call.branches.row(b) * images,
                                     call.vectors[b].norm_weight.get(), call.vectors[b].norm_bias.get(), of.hidden,
                                     of.norm_weight, of.norm_bias, images, branch.hidden, call.kinds.activation});
    if (!call.needs.hidden(b)) continue;
    shares.push_back(linear_backward_share<T>(branch.parameters[kW1], of.hidden, kept.state + 2, channels + 2,
                                              grads[Needs::index(b, kW1)], of.b1, context_part, images, branch.hidden));
    if (context_part) context_part += call.chunks(b, kW1, branch.hidden) * images * channels;
  }
  run_together(shares);
  if (call.context == call.context_parts) return;
  run<T>(ReduceArgs<A>{call.context_parts, call.context, 1, call.context_chunks(), images * channels});
}

// The gradients of x and of the mask's weight.
template <typename T>
void pool_backward(const Backward<T>& call, const KeptParts<acc_t<T>>& kept, T* grad_x) {
  using A = acc_t<T>;
  const FeatureMap& map = call.map;
  const int64_t images = map.shape.images, channels = map.shape.channels, pixels = map.shape.pixels;
  const A* scale = call.branches.has(kMul) ? kept.scale : nullptr;
  const T* grad = call.grad.template data_ptr<T>();
  if (!call.attention) {
    const A share = A(1) / static_cast<A>(pixels);
    for (int64_t i = 0; i < images * channels; ++i) call.context[i] *= share;
    run(BroadcastArgs<T>{map.shape, grad, scale, call.context, grad_x, past_caches(map)});
    return;
  }
  run(PoolBackwardArgs<T>{map.shape, call.plan, call.context, map.tensor.template data_ptr<T>(), kept.logits,
                          kept.state, call.attentions, call.logits, call.logit_sums, call.weight_parts});
  if (grad_x) {
    run(GradXArgs<T>{map.shape, grad, scale, call.attentions, call.context, call.logits, call.mask_weight.get(), grad_x,
                     past_caches(map)});
  }
  if (call.weight_parts) {
    run<T>(ReduceArgs<A>{call.weight_parts, call.weight_sum, 1, images * call.plan.splits, channels});
  }
}

// A gradient in its own type from that in the accumulation type.
template <typename T>
void narrow(const acc_t<T>* sum, const Tensor& grad) {
  if (!grad.defined()) return;
  with_weight<T>(grad, [&](auto* data) {
    using P = std::remove_pointer_t<decltype(data)>;
    kernels<P>().narrow(sum, data, grad.numel());
  });
}

template <typename T>
void run_backward(Backward<T>& call, Tensor& kept_memory, const Kept& layout, Gradients& grads) {
  using A = acc_t<T>;
  if (!call.runs(kAdd) && !call.runs(kMul)) return;
  const KeptParts<A> kept(kept_memory.data_ptr<A>(), layout);
  const Tensor scratch = allocate<A>(call, 0, call.map.accumulation());
  reduce_grad(call, kept);
  last_layer_backward(call, kept, grads);
  first_layer_backward(call, kept, grads);
  if (call.needs.context()) {
    const Tensor& grad_x = grads[Needs::kX];
    pool_backward(call, kept, grad_x.defined() ? grad_x.data_ptr<T>() : nullptr);
  }
  narrow<T>(call.weight_sum, grads[Needs::kMaskWeight]);
  for (const int b : {kAdd, kMul}) {
    const BranchGradients<A>& of = call.of[b];
    narrow<T>(of.b1, grads[Needs::index(b, kB1)]);
    narrow<T>(of.norm_weight, grads[Needs::index(b, kNormWeight)]);
    narrow<T>(of.norm_bias, grads[Needs::index(b, kNormBias)]);
    narrow<T>(of.b2, grads[Needs::index(b, kB2)]);
  }
}

std::vector<Tensor> global_context_backward(const Tensor& grad, const OptionalTensor& x,
                                            const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                            at::TensorList add, at::TensorList mul, const Tensor& kept,
                                            int64_t activation, int64_t gate, std::array<bool, Needs::kCount> needed) {
  const FeatureMap map(x ? *x : grad, x ? "x" : "grad");
  const BackwardProblem problem(grad, x, mask_weight, mask_bias, add, mul, kept, map.tensor, needed);
  const Kinds kinds(activation, gate);
  const Tensor grad_x = problem.needs.x() ? map.like() : Tensor();  // the largest first, as in the forward pass
  Gradients grads = problem.empty_gradients();
  grads[Needs::kX] = grad_x;
  if (problem.needs.mask_bias()) grads[Needs::kMaskBias].zero_();  // the softmax does not feel a shift of its logits
  const Tensor same_grad = grad.contiguous(map.format);
  const Tensor weight = mask_weight ? mask_weight->contiguous() : Tensor();
  Tensor memory = kept;
  dispatch(map.tensor.scalar_type(), [&](auto zero) {
    Backward<decltype(zero)> call(map, same_grad, weight, problem.branches, problem.needs, kinds);
    run_backward(call, memory, problem.kept, grads);
  });
  return problem.only_needed(grads);
}

}  // namespace

}  // namespace gc::cpu

TORCH_LIBRARY_IMPL(gc_cuda, CPU, m) { m.impl("global_context_backward", &gc::cpu::global_context_backward); }
