// The whole block as one operator: pool, transform, broadcast. x is read twice and out written once.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cpu/block.h"

namespace gc::cpu {

namespace {

// What a forward call is about, and its intermediate results.
template <typename T>
struct Forward {
  using A = acc_t<T>;

  const FeatureMap& x;
  const Branches& branches;
  Kinds kinds;
  double eps;
  bool attention;
  A mask_bias;
  Widened<T> mask_weight;
  std::array<WidenedVectors<T>, 2> vectors;
  Shape shape;  // of the pooling: for the mean, planes are taken in small groups
  Plan plan;
  A *partials = nullptr, *means = nullptr, *term = nullptr, *activated = nullptr;

  Forward(const FeatureMap& map, const Tensor& weight, const OptionalTensor& bias, const Branches& given, Kinds which,
          double epsilon)
      : x(map),
        branches(given),
        kinds(which),
        eps(epsilon),
        attention(weight.defined()),
        mask_bias(bias ? scalar<T>(*bias) : A(0)),
        mask_weight(weight),
        vectors{WidenedVectors<T>(given.each[kAdd]), WidenedVectors<T>(given.each[kMul])},
        shape(attention ? map.shape : streaming(map.shape)),
        plan(make_plan(shape, sizeof(T))) {}

  // Whether a row of pooling is an image's state.
  bool in_place() const { return shape.images == x.shape.images && shape.channels == x.shape.channels; }

  void take_from(Scratch<A>& scratch) {
    const int64_t images = x.shape.images, row = shape.channels + 2;
    if (plan.splits > 1) partials = scratch.take(shape.images * plan.splits * row);
    if (!in_place()) means = scratch.take(shape.images * row);
    if (branches.has(kAdd)) term = scratch.take(images * x.shape.channels);
    activated = scratch.take(images * branches.hidden());
    mask_weight.take_from(scratch);
    for (WidenedVectors<T>& one : vectors) one.take_from(scratch);
  }
};

// The mean of the pixels as a state: (0, S, mean).
template <typename T>
void pool_average(const Forward<T>& call, acc_t<T>* state) {
  using A = acc_t<T>;
  A* means = call.in_place() ? state : call.means;
  run(PoolArgs<T>{call.shape, call.plan, Weights::kUniform, true, call.x.tensor.template data_ptr<T>(), nullptr, A(0),
                  nullptr, call.plan.splits == 1 ? means : call.partials, means, nullptr});
  if (call.in_place()) return;
  const int64_t channels = call.x.shape.channels, group = call.shape.channels;
  for (int64_t image = 0; image < call.x.shape.images; ++image) {
    A* row = state + image * (channels + 2);
    row[0] = 0;
    row[1] = static_cast<A>(call.x.shape.pixels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t plane = image * channels + c;
      row[2 + c] = means[plane / group * (group + 2) + 2 + plane % group];
    }
  }
}

template <typename T>
void pool_attention(const Forward<T>& call, acc_t<T>* logits, acc_t<T>* state) {
  run(PoolArgs<T>{call.shape, call.plan, Weights::kMask, true, call.x.tensor.template data_ptr<T>(),
                  call.mask_weight.get(), call.mask_bias, logits, call.plan.splits == 1 ? state : call.partials, state,
                  nullptr});
}

template <typename T>
void run_forward(const Forward<T>& call, const KeptParts<acc_t<T>>& kept, Tensor& out) {
  using A = acc_t<T>;
  const FeatureMap& x = call.x;
  const Branches& branches = call.branches;
  const int64_t images = x.shape.images, channels = x.shape.channels;
  if (call.attention) {
    pool_attention(call, kept.logits, kept.state);
  } else {
    pool_average(call, kept.state);
  }

  A* const applied[] = {branches.has(kAdd) ? call.term : nullptr, branches.has(kMul) ? kept.scale : nullptr};
  Shares first, second;
  std::array<NormalizeArgs<A>, 2> between;
  size_t count = 0;
  for (const int b : {kAdd, kMul}) {
    if (!branches.has(b)) continue;
    const Branch& branch = branches.each[b];
    const WidenedVectors<T>& vectors = call.vectors[b];
    const int64_t units = branch.hidden;
    const int64_t start = images * branches.hidden_before(b);
    A* hidden = kept.normalized + start;
    first.push_back(linear_share<T>(branch.parameters[kW1], vectors.b1.get(), kept.state + 2, channels + 2, hidden,
                                    images, units, channels, Gate::kNone));
    between[count++] = {hidden,
                        kept.inverse_deviation + branches.row(b) * images,
                        vectors.norm_weight.get(),
                        vectors.norm_bias.get(),
                        call.activated + start,
                        units,
                        call.eps,
                        call.kinds.activation};
    second.push_back(linear_share<T>(branch.parameters[kW2], vectors.b2.get(), call.activated + start, units,
                                     applied[b], images, channels, units, call.kinds.of(b)));
  }
  run_together(first);
  for (size_t i = 0; i < count; ++i) kernels<A>().normalize(between[i], 0, images);
  run_together(second);

  run(BroadcastArgs<T>{x.shape, x.tensor.template data_ptr<T>(), applied[kMul], applied[kAdd],
                       out.template data_ptr<T>(), past_caches(x)});
}

// out, and what the backward pass takes; without `keep` that lies in the scratch memory.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                   at::TensorList add, at::TensorList mul, double eps, int64_t activation, int64_t gate,
                                   bool keep) {
  const FeatureMap map(x, "x");
  check_mask(mask_weight, mask_bias, x);
  check_epsilon(eps);
  const Branches branches(add, mul, x);
  const Kinds kinds(activation, gate);
  const Tensor weight = mask_weight ? mask_weight->contiguous() : Tensor();
  const Kept kept(map.shape.images, map.shape.channels, map.shape.pixels, weight.defined(), branches);
  // The largest first: a small piece in the place where it was the last time would have the heap grow.
  Tensor out = map.like(), memory;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Forward<T> call(map, weight, mask_bias, branches, kinds, eps);
    if (keep) memory = empty_tensor({kept.elements}, map.accumulation());
    const Tensor scratch = allocate<A>(call, keep ? 0 : kept.elements, map.accumulation());
    run_forward(call, KeptParts<A>((keep ? memory : scratch).template data_ptr<A>(), kept), out);
  });
  return {std::move(out), std::move(memory)};
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

}  // namespace

}  // namespace gc::cpu

TORCH_LIBRARY_IMPL(gc_cuda, CPU, m) {
  m.impl("global_context", &gc::cpu::global_context);
  m.impl("global_context_kept", &gc::cpu::global_context_kept);
}
