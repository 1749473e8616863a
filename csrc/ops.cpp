// The operators' schemas, and the Python module gc_cuda._C that carries them and says how it was built.
//
// Shapes: x [N, C, H, W] (NCHW or channels_last), S = H*W pixels; logits [N, S]; context [N, C]; state [N, C + 2] in the
// accumulation type (float32; float64 for float64 x): per image the largest logit m, z = sum_s exp(logit[s] - m), and the
// context before it is rounded to x's type.
#include <torch/extension.h>

#include "build_config.h"

TORCH_LIBRARY(gc_cuda, m) {
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
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build configuration of gc_cuda; importing it registers the torch.ops.gc_cuda operators.";
  m.def("build_config", &gc::build_config, "What was built: a dict of str.");
}
