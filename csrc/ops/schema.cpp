// The operators' schemas.
//
// Shapes: x [N, C, H, W] (NCHW or channels_last), S = H*W pixels; logits [N, S]; context [N, C]; state [N, C + 2] in
// the accumulation type (float32; float64 for float64 x): per image the largest logit m, z = sum_s exp(logit[s] - m),
// and the context before it is rounded to x's type.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>
#include <torch/version.h>

#include <vector>

TORCH_LIBRARY(gc_cuda, m) {
  // Feature maps may have either layout, and results follow them. Inductor, which on the CPU makes convolutions
  // channels_last, would otherwise copy each map to the layout that it was traced with, and back.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 6
  const std::vector<at::Tag> any_layout{at::Tag::flexible_layout};
#else  // there is no such tag, or not in every release
  const std::vector<at::Tag> any_layout;
#endif

  // context = sum_s softmax(logits)[s] * x[:, s]
  m.def("softmax_pool(Tensor x, Tensor logits) -> (Tensor context, Tensor state)");
  m.def(
      "softmax_pool_backward(Tensor grad_context, Tensor x, Tensor logits, Tensor state) -> "
      "(Tensor grad_x, Tensor grad_logits)");

  // The same with logits[s] = mask_weight . x[:, s] + mask_bias, computed from the one read of x.
  m.def(
      "attention_pool(Tensor x, Tensor mask_weight, Tensor? mask_bias) -> "
      "(Tensor context, Tensor logits, Tensor state)");
  m.def(
      "attention_pool_backward(Tensor grad_context, Tensor x, Tensor mask_weight, Tensor logits, Tensor state) -> "
      "(Tensor grad_x, Tensor grad_mask_weight)");

  // sum_s x[:, s], or its mean
  m.def("pixel_sum(Tensor x, bool mean) -> Tensor");

  // out = x * scale + term, either of them absent
  m.def("broadcast(Tensor x, Tensor? scale, Tensor? term) -> Tensor");
  // grad_x = grad * scale, grad_scale = sum_s grad * x, grad_term = sum_s grad
  m.def(
      "broadcast_mul_backward(Tensor grad, Tensor x, Tensor scale) -> "
      "(Tensor grad_x, Tensor grad_scale, Tensor grad_term)");
  // The same without grad_x, which takes no scale: both sums from one read of grad and x.
  m.def("broadcast_sums(Tensor grad, Tensor x) -> (Tensor grad_scale, Tensor grad_term)");

  // The whole block: pooling (the mean without mask_weight), the transforms t of the branches, out = x * gate(t_mul) +
  // t_add. add and mul are empty, or (w1, b1, norm_weight, norm_bias, w2, b2), or the same without a norm. activation:
  // 0 ReLU, 1 SiLU, 2 Hardswish; gate: 0 sigmoid, 1 hardsigmoid.
  m.def(
      "global_context(Tensor x, Tensor? mask_weight, Tensor? mask_bias, Tensor[] add, Tensor[] mul, float eps, "
      "int activation, int gate) -> Tensor",
      any_layout);
  // The same, and what its backward pass takes (Kept in state.h).
  m.def(
      "global_context_kept(Tensor x, Tensor? mask_weight, Tensor? mask_bias, Tensor[] add, Tensor[] mul, float eps, "
      "int activation, int gate) -> (Tensor out, Tensor kept)",
      any_layout);
  // The gradients that are needed of x, mask_weight, mask_bias, add's six and mul's six, in this order. x may be None
  // where nothing that is needed depends on it, and mask_bias where it needs no gradient.
  m.def(
      "global_context_backward(Tensor grad, Tensor? x, Tensor? mask_weight, Tensor? mask_bias, Tensor[] add, "
      "Tensor[] mul, Tensor kept, int activation, int gate, bool[15] needed) -> Tensor[]",
      any_layout);

  // The residual tail: x = BN(y), the block as above (none without add and mul), out = relu(block(x) + identity).
  // norm_kind: 0 no norm, 1 with mean and variance as given, 2 with those of the batch. kept: TailKept in
  // tail_problem.h, which begins with mean, 1 / sqrt(variance + norm_eps), variance, the unbiased one of the batch,
  // and bias, each [C]. With a group of more than one process, and norm_kind 2, they are those of all its batches.
  // image_factor [N]: of block(x), before the addition.
  m.def(
      "bn_context_add_relu(Tensor y, Tensor? identity, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, "
      "int norm_kind, float norm_eps, Tensor? mask_weight, Tensor? mask_bias, Tensor[] add, Tensor[] mul, float eps, "
      "int activation, int gate, bool relu, str group_name='', int group_size=1, Tensor? image_factor=None) "
      "-> (Tensor out, Tensor kept)",
      any_layout);
  // norm_kind 2, which moves the running statistics.
  m.def(
      "bn_context_add_relu_training(Tensor y, Tensor? identity, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float norm_eps, Tensor? mask_weight, "
      "Tensor? mask_bias, Tensor[] add, Tensor[] mul, float eps, int activation, int gate, bool relu, "
      "str group_name='', int group_size=1, Tensor? image_factor=None) -> (Tensor out, Tensor kept)");
  // The gradients that are needed of y, identity, weight, bias, mask_weight, mask_bias, add's six and mul's six, in
  // this order. out: None without a ReLU. y may be None where nothing that is needed reads it.
  m.def(
      "bn_context_add_relu_backward(Tensor grad, Tensor? y, Tensor? out, Tensor? weight, Tensor? bias, int norm_kind, "
      "Tensor? mask_weight, Tensor? mask_bias, Tensor[] add, Tensor[] mul, Tensor kept, int activation, int gate, "
      "bool[18] needed, str group_name='', int group_size=1, Tensor? image_factor=None) -> Tensor[]",
      any_layout);
}
