// The operators of the whole block as functions of the Python module. A call through torch.ops is read argument by
// argument, by the words of the schema, and boxed; for a small map that takes longer than the block. These go to the
// dispatcher with what they are given: whatever watches operators there, such as a profiler, sees the same.
#pragma once

#include <torch/extension.h>

namespace gc {

// Enters the functions in the Python module, under the names of the operators.
void bind_calls(pybind11::module_& module);

}  // namespace gc
