// The Python module gc_cuda._C: it carries the operators, says how it was built, and prints launch plans.
#include <torch/extension.h>

#include <optional>
#include <string>

#include "cuda/plan/transform_plan.h"
#include "python/build_config.h"
#include "python/calls.h"
#include "python/reading.h"

namespace {

// The enumerator of that name.
template <typename Enum>
Enum named(const std::string& name, int count, const char* argument) {
  std::string names;
  for (int i = 0; i < count; ++i) {
    const char* const candidate = gc::name_of(static_cast<Enum>(i));
    if (name == candidate) return static_cast<Enum>(i);
    names += std::string(i == 0 ? "" : ", ") + candidate;
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + names + ", got " + name);
}

gc::Plan plan(const std::string& kernel, int64_t images, int64_t channels, int64_t pixels, const std::string& layout,
              const std::string& dtype, int alignment, int multiprocessors, int shared_bytes, bool dots_given,
              const std::string& paths, int late_splits) {
  const gc::Problem problem{
      images,   channels, pixels, named<gc::Layout>(layout, 2, "layout"), named<gc::ElementType>(dtype, 4, "dtype"),
      alignment};
  return gc::make_plan(named<gc::KernelKind>(kernel, gc::kKernelKinds, "kernel"), problem,
                       {multiprocessors, shared_bytes, gc::paths_named(paths), late_splits}, dots_given);
}

gc::TransformPlan transform_plan(const std::string& pass, int64_t images, int64_t channels,
                                 const std::vector<int64_t>& hidden, const std::string& dtype, bool pairs,
                                 int multiprocessors, int shared_bytes, const std::string& paths) {
  if (hidden.empty() || hidden.size() > 2) {
    throw std::invalid_argument("hidden must have one or two numbers, got " + std::to_string(hidden.size()));
  }
  const gc::TransformProblem problem{images,
                                     channels,
                                     static_cast<int>(hidden.size()),
                                     {hidden[0], hidden.back()},
                                     named<gc::ElementType>(dtype, 4, "dtype"),
                                     pairs};
  const gc::DeviceLimits device{multiprocessors, shared_bytes, gc::paths_named(paths)};
  if (pass == "forward") return gc::make_transform_forward_plan(problem, device);
  if (pass == "backward") return gc::make_transform_backward_plan(problem, device, gc::TransformDepth::kContext);
  throw std::invalid_argument("pass must be one of forward, backward, got " + pass);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build configuration and launch plans of gc_cuda; importing it registers the torch.ops.gc_cuda operators.";
  m.def("build_config", &gc::build_config, "What was built: a dict of str.");
  gc::bind_reading(m);
  gc::bind_calls(m);

  py::class_<gc::Plan>(m, "Plan", "How a kernel would be launched; print it.")
      .def_readonly("rows", &gc::Plan::rows)
      .def_readonly("width", &gc::Plan::width)
      .def_readonly("flat", &gc::Plan::flat)
      .def_property_readonly("paths", [](const gc::Plan& self) { return gc::names_of(self.paths); })
      .def_readonly("chunks", &gc::Plan::chunks)
      .def_readonly("holds_channels", &gc::Plan::holds_channels)
      .def_readonly("shared_bytes", &gc::Plan::shared_bytes)
      .def_readonly("workspace", &gc::Plan::workspace)
      .def_readonly("tickets", &gc::Plan::tickets)
      .def_property_readonly("splits", [](const gc::Plan& self) { return self.walk.splits; })
      .def_property_readonly("group", [](const gc::Plan& self) { return self.walk.group; })
      .def_property_readonly("tiles_per_split", [](const gc::Plan& self) { return self.walk.tiles_per_split; })
      .def_property_readonly("longer", [](const gc::Plan& self) { return self.walk.longer; })
      .def_readonly("resident", &gc::Plan::resident)
      .def_property_readonly("tile_channels", &gc::Plan::tile_channels)
      .def_property_readonly("tile_pixels", &gc::Plan::tile_pixels)
      .def_property_readonly("threads", &gc::Plan::threads)
      .def_property_readonly("grid", [](const gc::Plan& self) { return py::make_tuple(self.grid_x(), self.grid_y()); })
      .def("__str__", &gc::Plan::to_string)
      .def("__repr__", &gc::Plan::to_string);
  // The defaults describe an H200.
  m.def("plan", &plan, "The launch plan of a CUDA kernel; needs no GPU.", py::arg("kernel"), py::arg("images"),
        py::arg("channels"), py::arg("pixels"), py::arg("layout") = "NCHW", py::arg("dtype") = "float32",
        py::arg("alignment") = 16, py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 232448,
        py::arg("dots_given") = false, py::arg("paths") = "none", py::arg("late_splits") = gc::kMostLateSplits);

  py::class_<gc::TransformPlan>(m, "TransformPlan", "How a kernel of the transform would be launched; print it.")
      .def_property_readonly("paths", [](const gc::TransformPlan& self) { return gc::names_of(self.paths); })
      .def_readonly("width", &gc::TransformPlan::width)
      .def_readonly("tile_images", &gc::TransformPlan::tile_images)
      .def_property_readonly(
          "shares", [](const gc::TransformPlan& self) { return std::vector<int>{self.shares[0], self.shares[1]}; })
      .def_readonly("slab_steps", &gc::TransformPlan::slab_steps)
      .def_readonly("shared_bytes", &gc::TransformPlan::shared_bytes)
      .def_readonly("workspace", &gc::TransformPlan::workspace)
      .def_property_readonly("blocks",
                             [](const gc::TransformPlan& self) {
                               return std::vector<int>(self.grid.blocks, self.grid.blocks + self.grid.phases);
                             })
      .def("__str__", &gc::TransformPlan::to_string)
      .def("__repr__", &gc::TransformPlan::to_string);
  m.def("transform_plan", &transform_plan,
        "The launch plan of the transform, pass forward or backward; hidden has the hidden units of each branch.",
        py::arg("pass_"), py::arg("images"), py::arg("channels"), py::arg("hidden"), py::arg("dtype") = "float32",
        py::arg("pairs") = true, py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 232448,
        py::arg("paths") = "none");

  m.def(
      "choose_paths",
      [](const std::optional<std::string>& list) {
        gc::choose_paths(list ? std::optional(gc::paths_named(*list)) : std::nullopt);
      },
      "Which newer paths the CUDA launches of this process go: names with commas between, all, none; or None for those "
      "that were measured on the GPU at hand.",
      py::arg("paths"));
  m.def(
      "chosen_paths",
      []() -> std::optional<std::string> {
        const auto paths = gc::chosen_paths();
        return paths ? std::optional(gc::names_of(*paths)) : std::nullopt;
      },
      "What choose_paths, or GC_CUDA_PATHS, has chosen; or None.");
  m.def(
      "tail_on", [](int compute_capability) { return gc::paths_on(compute_capability).has(gc::Path::kTail); },
      "Whether the residual tail runs by kernels on such a GPU.", py::arg("compute_capability"));
  m.def(
      "around_on", [](int compute_capability) { return gc::paths_on(compute_capability).has(gc::Path::kAround); },
      "Whether blocks with a middle of their own run around it on such a GPU.", py::arg("compute_capability"));
  m.def(
      "paths_on", [](int compute_capability) { return gc::names_of(gc::paths_on(compute_capability)); },
      "Which newer paths the launches of this process go on such a GPU.", py::arg("compute_capability"));
}
