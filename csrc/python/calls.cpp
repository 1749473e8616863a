#include "python/calls.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/needs.h"
#include "ops/tail_problem.h"

namespace gc {

namespace {

using Tensors = std::vector<Tensor>;

using Forward = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, at::TensorList, at::TensorList,
                       double, int64_t, int64_t);
using ForwardKept = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                               at::TensorList, at::TensorList, double, int64_t, int64_t);
using Backward = Tensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         at::TensorList, at::TensorList, const Tensor&, int64_t, int64_t,
                         std::array<bool, Needs::kCount>);

using Tail = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                                        double, const OptionalTensor&, const OptionalTensor&, at::TensorList,
                                        at::TensorList, double, int64_t, int64_t, bool, c10::string_view, int64_t,
                                        const OptionalTensor&);
using TailTraining = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                double, double, const OptionalTensor&, const OptionalTensor&,
                                                at::TensorList, at::TensorList, double, int64_t, int64_t, bool,
                                                c10::string_view, int64_t, const OptionalTensor&);
using TailBackward = Tensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, int64_t, const OptionalTensor&, const OptionalTensor&,
                             at::TensorList, at::TensorList, const Tensor&, int64_t, int64_t,
                             std::array<bool, TailNeeds::kCount>, c10::string_view, int64_t, const OptionalTensor&);

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Python's lock is not held meanwhile. The callers see to the gradients: autograd, which has nothing to say to these
// operators, would box their arguments to say it.
class Outside {
  pybind11::gil_scoped_release release_;
  at::AutoDispatchBelowADInplaceOrView below_;
};

Tensor global_context(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                      const Tensors& add, const Tensors& mul, double eps, int64_t activation, int64_t gate) {
  static const auto op = operator_of<Forward>("gc_cuda::global_context");
  const Outside outside;
  return op.call(x, mask_weight, mask_bias, add, mul, eps, activation, gate);
}

std::tuple<Tensor, Tensor> global_context_kept(const Tensor& x, const OptionalTensor& mask_weight,
                                               const OptionalTensor& mask_bias, const Tensors& add, const Tensors& mul,
                                               double eps, int64_t activation, int64_t gate) {
  static const auto op = operator_of<ForwardKept>("gc_cuda::global_context_kept");
  const Outside outside;
  return op.call(x, mask_weight, mask_bias, add, mul, eps, activation, gate);
}

Tensors global_context_backward(const Tensor& grad, const OptionalTensor& x, const OptionalTensor& mask_weight,
                                const OptionalTensor& mask_bias, const Tensors& add, const Tensors& mul,
                                const Tensor& kept, int64_t activation, int64_t gate, const std::vector<bool>& needed) {
  static const auto op = operator_of<Backward>("gc_cuda::global_context_backward");
  std::array<bool, Needs::kCount> placed{needed.at(0), needed.at(1), needed.at(2)};
  size_t next = 3;
  for (const int b : {kAdd, kMul}) {
    const Tensors& branch = b == kAdd ? add : mul;
    for (int i = 0; i < kParameters; ++i) {
      if (is_given(branch.size(), static_cast<Parameter>(i)))
        placed[Needs::index(b, static_cast<Parameter>(i))] = needed.at(next++);
    }
  }
  const Outside outside;
  return op.call(grad, x, mask_weight, mask_bias, add, mul, kept, activation, gate, placed);
}

std::tuple<Tensor, Tensor> bn_context_add_relu(const Tensor& y, const OptionalTensor& identity,
                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& mean, const OptionalTensor& variance,
                                               int64_t norm_kind, double norm_eps, const OptionalTensor& mask_weight,
                                               const OptionalTensor& mask_bias, const Tensors& add, const Tensors& mul,
                                               double eps, int64_t activation, int64_t gate, bool relu,
                                               const std::string& group_name, int64_t group_size,
                                               const OptionalTensor& image_factor) {
  static const auto op = operator_of<Tail>("gc_cuda::bn_context_add_relu");
  const Outside outside;
  return op.call(y, identity, weight, bias, mean, variance, norm_kind, norm_eps, mask_weight, mask_bias, add, mul, eps,
                 activation, gate, relu, group_name, group_size, image_factor);
}

std::tuple<Tensor, Tensor> bn_context_add_relu_training(
    const Tensor& y, const OptionalTensor& identity, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum, double norm_eps,
    const OptionalTensor& mask_weight, const OptionalTensor& mask_bias, const Tensors& add, const Tensors& mul,
    double eps, int64_t activation, int64_t gate, bool relu, const std::string& group_name, int64_t group_size,
    const OptionalTensor& image_factor) {
  static const auto op = operator_of<TailTraining>("gc_cuda::bn_context_add_relu_training");
  const Outside outside;
  return op.call(y, identity, weight, bias, running_mean, running_var, momentum, norm_eps, mask_weight, mask_bias, add,
                 mul, eps, activation, gate, relu, group_name, group_size, image_factor);
}

Tensors bn_context_add_relu_backward(const Tensor& grad, const OptionalTensor& y, const OptionalTensor& out,
                                     const OptionalTensor& weight, const OptionalTensor& bias, int64_t norm_kind,
                                     const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                                     const Tensors& add, const Tensors& mul, const Tensor& kept, int64_t activation,
                                     int64_t gate, const std::array<bool, TailNeeds::kCount>& needed,
                                     const std::string& group_name, int64_t group_size,
                                     const OptionalTensor& image_factor) {
  static const auto op = operator_of<TailBackward>("gc_cuda::bn_context_add_relu_backward");
  const Outside outside;
  return op.call(grad, y, out, weight, bias, norm_kind, mask_weight, mask_bias, add, mul, kept, activation, gate,
                 needed, group_name, group_size, image_factor);
}

// How often each has been changed in place; -1 for None, and for a tensor that does not count.
py::tuple versions(const py::tuple& tensors) {
  py::tuple counts(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    int64_t count = -1;
    if (!tensors[i].is_none()) {
      const auto tensor = tensors[i].cast<Tensor>();
      if (!tensor.is_inference()) count = static_cast<int64_t>(tensor._version());
    }
    counts[i] = count;
  }
  return counts;
}

}  // namespace

void bind_calls(pybind11::module_& module) {
  module.def("global_context", &global_context, "torch.ops.gc_cuda.global_context, by position.");
  module.def("global_context_kept", &global_context_kept, "torch.ops.gc_cuda.global_context_kept, by position.");
  module.def(
      "global_context_backward", &global_context_backward,
      "torch.ops.gc_cuda.global_context_backward, by position, where needed tells of the tensors that are given.");
  module.def("bn_context_add_relu", &bn_context_add_relu, "torch.ops.gc_cuda.bn_context_add_relu, by position.");
  module.def("bn_context_add_relu_training", &bn_context_add_relu_training,
             "torch.ops.gc_cuda.bn_context_add_relu_training, by position.");
  module.def("bn_context_add_relu_backward", &bn_context_add_relu_backward,
             "torch.ops.gc_cuda.bn_context_add_relu_backward, by position.");
  module.def("versions", &versions, "How often each tensor of a tuple has been changed in place, or -1.");
}

}  // namespace gc
