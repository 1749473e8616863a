// The transforms of the whole block, which both branches take together: memory for what they need, and linear maps as
// shares of one parallel region.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <functional>

#include "cpu/norm.h"
#include "cpu/run.h"
#include "cpu/scratch.h"

namespace gc::cpu {

// One of the computations of a parallel region: calls(begin, end) does a range of its `count` items, each of which is
// about as much work as `elements` of x.
struct Share {
  int64_t count;
  int64_t elements;
  std::function<void(int64_t, int64_t)> calls;
};

using Shares = c10::SmallVector<Share, 2>;

// Does all shares in one parallel region, which counts their items one after the other.
inline void run_together(const Shares& shares) {
  int64_t total = 0, elements = 0;
  for (const Share& share : shares) {
    total += share.count;
    elements = std::max(elements, share.elements);
  }
  parallel(total, elements, [&](int64_t begin, int64_t end) {
    for (const Share& share : shares) {
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, share.count);
      if (first < last) share.calls(first, last);
      begin -= share.count;
      end -= share.count;
    }
  });
}

// Calls body(pointer) with a weight in its own type: x's type T or the accumulation type.
template <typename T, typename Body>
auto with_weight(const at::Tensor& weight, const Body& body) {
  if constexpr (!std::is_same_v<T, acc_t<T>>) {
    if (weight.scalar_type() == c10::CppTypeToScalarType<T>::value) return body(weight.data_ptr<T>());
  }
  return body(weight.data_ptr<acc_t<T>>());
}

// out = gate(weight in + bias)
template <typename T>
Share linear_share(const at::Tensor& weight, const acc_t<T>* bias, const acc_t<T>* in, int64_t in_stride, acc_t<T>* out,
                   int64_t images, int64_t rows, int64_t columns, Gate gate) {
  return with_weight<T>(weight, [&](auto* data) {
    using W = std::remove_pointer_t<decltype(data)>;
    LinearArgs<W> args{};
    args.weight = data;
    args.bias = bias;
    args.in = in;
    args.out = out;
    args.images = images;
    args.rows = rows;
    args.columns = columns;
    args.in_stride = in_stride;
    args.gate = gate;
    return Share{divide_up(rows, kLinearRows), kLinearRows * columns * images,
                 [args](int64_t begin, int64_t end) { kernels<W>().linear(args, begin, end); }};
  });
}

inline Pieces make_pieces(const at::Tensor& weight, int64_t rows) {
  return make_pieces(rows, weight.numel() / rows, weight.element_size());
}

// The gradients of weight (where defined), of the bias and of in (where not null), the latter as a partial sum of each
// chunk.
template <typename T>
Share linear_backward_share(const at::Tensor& weight, const acc_t<T>* grad, const acc_t<T>* in, int64_t in_stride,
                            const at::Tensor& grad_weight, acc_t<T>* grad_bias, acc_t<T>* grad_in, int64_t images,
                            int64_t rows) {
  return with_weight<T>(weight, [&](auto* data) {
    using W = std::remove_pointer_t<decltype(data)>;
    LinearBackwardArgs<W> args{};
    args.weight = data;
    args.grad = grad;
    args.in = in;
    args.grad_weight = grad_weight.defined() ? grad_weight.data_ptr<W>() : nullptr;
    args.grad_bias = grad_bias;
    args.grad_in = grad_in;
    args.images = images;
    args.rows = rows;
    args.columns = weight.numel() / rows;
    args.in_stride = in_stride;
    args.pieces = make_pieces(weight, rows);
    return Share{args.pieces.count(), divide_up(weight.numel(), args.pieces.count()) * images,
                 [args](int64_t begin, int64_t end) { kernels<W>().linear_backward(args, begin, end); }};
  });
}

// The vectors of a branch in the accumulation type. Those that are not there are null.
template <typename T>
class Vectors {
  using A = acc_t<T>;

 public:
  Vectors(const FeatureMap& x, const Branch& branch, Scratch<A>& scratch) : x_(x), branch_(branch) {
    for (const Parameter which : {kB1, kNormWeight, kNormBias, kB2})
      copies_[which] = take_copy<T>(scratch, count(which));
  }

  const A* get(Parameter which) const {
    return widen<T>(x_.companion(branch_.parameters[which]), count(which), copies_[which]);
  }

 private:
  int64_t count(Parameter which) const {
    const Tensor& vector = branch_.parameters[which];
    return vector.defined() ? vector.numel() : 0;
  }

  const FeatureMap& x_;
  const Branch& branch_;
  std::array<A*, kParameters> copies_{};
};

template <typename T>
struct TransformForwardMemory {
  using A = acc_t<T>;
  std::array<Vectors<T>, 2> vectors;
  std::array<A*, 2> activated;  // [N, P]

  TransformForwardMemory(const FeatureMap& x, const Branches& branches, Scratch<A>& scratch)
      : vectors{Vectors<T>(x, branches.each[kAdd], scratch), Vectors<T>(x, branches.each[kMul], scratch)} {
    for (const int b : {kAdd, kMul}) activated[b] = scratch.take(x.images() * branches.each[b].hidden);
  }
};

template <typename T>
void transform(const FeatureMap& x, const Branches& branches, const TransformForwardCall& call,
               const TransformForwardMemory<T>& memory) {
  using A = acc_t<T>;
  const int64_t images = x.images(), channels = x.channels();
  const A* const context = static_cast<const A*>(call.kept.context);
  Shares first, second;
  std::array<NormalizeArgs<A>, 2> between{};
  for (const int b : {kAdd, kMul}) {
    if (!branches.has(b)) continue;
    const Branch& branch = branches.each[b];
    const Vectors<T>& vectors = memory.vectors[b];
    NormalizeArgs<A>& norm = between[b];
    norm.hidden = static_cast<A*>(call.kept.normalized[b]);
    norm.inverse_deviation = static_cast<A*>(call.kept.inverse_deviation[b]);
    norm.weight = vectors.get(kNormWeight);
    norm.bias = vectors.get(kNormBias);
    norm.activated = memory.activated[b];
    norm.width = branch.hidden;
    norm.eps = call.eps;
    norm.activation = call.kinds.activation;
    first.push_back(linear_share<T>(branch.parameters[kW1], vectors.get(kB1), context, channels + kStatistics,
                                    norm.hidden, images, branch.hidden, channels, Gate::kNone));
    second.push_back(linear_share<T>(branch.parameters[kW2], vectors.get(kB2), norm.activated, branch.hidden,
                                     static_cast<A*>(call.outs[b]), images, channels, branch.hidden, call.kinds.of(b)));
  }
  run_together(first);
  for (const NormalizeArgs<A>& norm : between) {
    if (norm.hidden != nullptr) kernels<A>().normalize(norm, 0, images);
  }
  run_together(second);
}

// The gradients of a branch on the way, and sums that are parameters' gradients before they are narrowed. Null is what
// is not needed.
template <typename A>
struct BranchGradients {
  A* activated = nullptr;                           // [N, P]
  A *hidden_partials = nullptr, *hidden = nullptr;  // [chunks, N, P], [N, P]
  A* context_partials = nullptr;                    // [chunks, N, C]
  std::array<A*, kParameters> sums{};               // of b1, norm_weight, norm_bias, b2
};

inline int64_t chunks_of(const Branch& branch, Parameter which, int64_t rows) {
  return make_pieces(branch.parameters[which], rows).chunks;
}

template <typename T>
struct TransformBackwardMemory {
  using A = acc_t<T>;
  std::array<Vectors<T>, 2> vectors;
  std::array<BranchGradients<A>, 2> of;
  A* context_partials = nullptr;  // of both branches
  int64_t context_chunks = 0;
  // Of the residual tail: what the pass is given otherwise.
  NormMemory<T> norm;
  A* state = nullptr;
  std::array<A*, 2> grad_outs{};

  TransformBackwardMemory(const FeatureMap& x, const BackwardProblem& problem, bool normalized, Scratch<A>& scratch)
      : vectors{Vectors<T>(x, problem.branches.each[kAdd], scratch),
                Vectors<T>(x, problem.branches.each[kMul], scratch)},
        norm(x, scratch, normalized) {
    const Needs& needs = problem.needs;
    if (normalized) {
      state = scratch.take(x.images() * (x.channels() + kStatistics));
      for (A*& grad_out : grad_outs) grad_out = scratch.take(x.images() * x.channels());
    }
    for (const int b : {kAdd, kMul}) {
      if (!needs.branch(problem.branches, b)) continue;
      const Branch& branch = problem.branches.each[b];
      const int64_t hidden = x.images() * branch.hidden;
      BranchGradients<A>& own = of[b];
      if (needs.parameter(b, kB2)) own.sums[kB2] = scratch.take(x.channels());
      if (needs.parameter(b, kW2)) own.activated = scratch.take(hidden);
      if (!needs.activated(b)) continue;
      own.hidden_partials = scratch.take(chunks_of(branch, kW2, x.channels()) * hidden);
      own.hidden = scratch.take(hidden);
      // These two are summed whoever needs them.
      own.sums[kNormWeight] = scratch.take(branch.hidden);
      own.sums[kNormBias] = scratch.take(branch.hidden);
      if (needs.parameter(b, kB1)) own.sums[kB1] = scratch.take(branch.hidden);
      if (needs.context() && needs.hidden(b)) context_chunks += chunks_of(branch, kW1, branch.hidden);
    }
    if (!needs.context()) return;
    if (context_chunks == 1) return;  // it is the gradient of the context itself
    context_partials = scratch.take(context_chunks * x.images() * x.channels());
    A* next = context_partials;
    for (const int b : {kAdd, kMul}) {
      if (!needs.branch(problem.branches, b)) continue;
      of[b].context_partials = next;
      const Branch& branch = problem.branches.each[b];
      next += chunks_of(branch, kW1, branch.hidden) * x.images() * x.channels();
    }
  }
};

template <typename T>
struct TransformBackwardPass {
  using A = acc_t<T>;

  const FeatureMap& x;
  const BackwardProblem& problem;
  const TransformBackwardCall& call;
  const TransformBackwardMemory<T>& memory;

  const Branch& branch(int b) const { return problem.branches.each[b]; }
  bool runs(int b) const { return problem.needs.branch(problem.branches, b); }
  A* grad_out(int b) const { return static_cast<A*>(call.grad_outs[b]); }
  A* normalized(int b) const { return static_cast<A*>(call.kept.normalized[b]); }

  void run_all() const {
    if (runs(kMul)) {
      const A* const scale = static_cast<const A*>(call.kept.scale);
      kernels<A>().gate_backward(call.kinds.gate, scale, grad_out(kMul), x.images() * x.channels());
    }
    output();
    norm();
    input();
    store();
  }

  // The gradients of W2 and b2, and that of the activated hidden units.
  void output() const {
    Shares shares;
    for (const int b : {kAdd, kMul}) {
      if (!runs(b)) continue;
      const BranchGradients<A>& of = memory.of[b];
      if (of.activated) {
        NormalizeArgs<A> args{};
        args.hidden = normalized(b);
        args.weight = memory.vectors[b].get(kNormWeight);
        args.bias = memory.vectors[b].get(kNormBias);
        args.activated = of.activated;
        args.width = branch(b).hidden;
        args.activation = call.kinds.activation;
        kernels<A>().activate(args, 0, x.images());
      }
      shares.push_back(linear_backward_share<T>(branch(b).parameters[kW2], grad_out(b), of.activated, branch(b).hidden,
                                                call.grads[Needs::index(b, kW2)], of.sums[kB2], of.hidden_partials,
                                                x.images(), x.channels()));
    }
    run_together(shares);
  }

  // The gradients of the norm's weight and bias, and that of the hidden units.
  void norm() const {
    for (const int b : {kAdd, kMul}) {
      const BranchGradients<A>& of = memory.of[b];
      if (!of.hidden) continue;
      add_members<T>(of.hidden_partials, of.hidden, 1, chunks_of(branch(b), kW2, x.channels()),
                     x.images() * branch(b).hidden);
      NormalizeBackwardArgs<A> args{};
      args.normalized = normalized(b);
      args.inverse_deviation = static_cast<const A*>(call.kept.inverse_deviation[b]);
      args.weight = memory.vectors[b].get(kNormWeight);
      args.bias = memory.vectors[b].get(kNormBias);
      args.grad = of.hidden;
      args.grad_weight = of.sums[kNormWeight];
      args.grad_bias = of.sums[kNormBias];
      args.images = x.images();
      args.width = branch(b).hidden;
      args.activation = call.kinds.activation;
      kernels<A>().normalize_backward(args);
    }
  }

  // The gradients of W1 and b1, and that of the context.
  void input() const {
    const int64_t channels = x.channels();
    const A* const context = static_cast<const A*>(call.kept.context);
    A* const grad_context = static_cast<A*>(call.grad_context);
    Shares shares;
    for (const int b : {kAdd, kMul}) {
      const BranchGradients<A>& of = memory.of[b];
      if (!of.hidden || !problem.needs.hidden(b)) continue;
      A* const partials = memory.context_chunks == 1 ? grad_context : of.context_partials;
      shares.push_back(linear_backward_share<T>(branch(b).parameters[kW1], of.hidden, context, channels + kStatistics,
                                                call.grads[Needs::index(b, kW1)], of.sums[kB1], partials, x.images(),
                                                branch(b).hidden));
    }
    run_together(shares);
    if (grad_context == nullptr) return;
    const int64_t count = x.images() * channels;
    if (memory.context_chunks > 1)
      add_members<T>(memory.context_partials, grad_context, 1, memory.context_chunks, count);
    if (call.factor == 1) return;
    const A factor = static_cast<A>(call.factor);
    for (int64_t i = 0; i < count; ++i) grad_context[i] *= factor;
  }

  // Parameters' gradients in their own types.
  void store() const {
    for (const int b : {kAdd, kMul}) {
      for (const Parameter which : {kB1, kNormWeight, kNormBias, kB2})
        put(memory.of[b].sums[which], Needs::index(b, which));
    }
    static const A kZero = 0;  // the softmax does not feel a shift of its logits
    put(&kZero, Needs::kMaskBias);
  }

  void put(const A* sum, int number) const {
    const Tensor& grad = call.grads[number];
    if (!grad.defined()) return;
    with_weight<T>(
        grad, [&](auto* data) { kernels<std::remove_pointer_t<decltype(data)>>().narrow(sum, data, grad.numel()); });
  }
};

class TransformForward {
 public:
  TransformForward(const FeatureMap& x, const Branches& branches, const Unmerged&) : x_(x), branches_(branches) {}
  Wanted wanted() const { return wanted_by<TransformForwardMemory>(x_, branches_); }
  void launch(const TransformForwardCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) { transform<decltype(zero)>(x_, branches_, call, memory); };
    with_memory<TransformForwardMemory>(lent, body, x_, branches_);
  }

 private:
  const FeatureMap& x_;
  const Branches& branches_;
};

class TransformBackward {
 public:
  TransformBackward(const FeatureMap& x, const BackwardProblem& of, const void*, const Unmerged& = {},
                    bool normalized = false)
      : x_(x), of_(of), normalized_(normalized) {}
  Wanted wanted() const { return wanted_by<TransformBackwardMemory>(x_, of_, normalized_); }
  void launch(const TransformBackwardCall& call, Lent lent) const {
    const auto body = [&](auto zero, const auto& memory) {
      using T = decltype(zero);
      if (call.normalized == nullptr) return TransformBackwardPass<T>{x_, of_, call, memory}.run_all();
      KeptParts of_x = call.kept;
      of_x.set_state(memory.state, x_);
      TransformBackwardCall plain{call.kinds, call.factor, of_x, {}, call.grad_context, call.grads};
      for (const int b : {kAdd, kMul}) plain.grad_outs[b] = memory.grad_outs[b];
      give_inputs(call, memory);
      TransformBackwardPass<T>{x_, of_, plain, memory}.run_all();
    };
    with_memory<TransformBackwardMemory>(lent, body, x_, of_, normalized_);
  }

 private:
  // The state of x and the gradients of what the branches give, as NormalizedSums says.
  template <typename T>
  void give_inputs(const TransformBackwardCall& call, const TransformBackwardMemory<T>& memory) const {
    using A = acc_t<T>;
    const int64_t channels = x_.channels(), count = x_.images() * channels;
    const NormVectors<T> norm(call.normalized->norm, channels, memory.norm);
    normalize_contexts(norm, x_.images(), channels, static_cast<const A*>(call.kept.state), memory.state);
    const A* const p = static_cast<const A*>(call.normalized->sums);
    const A* const u = static_cast<const A*>(call.normalized->product_sums);
    if (of_.needs.branch(of_.branches, kAdd)) std::copy_n(p, count, memory.grad_outs[kAdd]);
    if (!of_.needs.branch(of_.branches, kMul)) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = i % channels;
      memory.grad_outs[kMul][i] = norm.slope[c] * u[i] + norm.bias[c] * p[i];
    }
  }

  const FeatureMap& x_;
  const BackwardProblem& of_;
  bool normalized_;
};

}  // namespace gc::cpu
