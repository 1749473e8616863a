// What a block's reader (gc_cuda/blocks/_parts.py) has seen of the block, so that the next call asks only whether all
// of it still holds. No rule is stated here: the reader in Python decides what is served, this remembers what it looked
// at.
#pragma once

#include <torch/extension.h>

namespace gc {

// Enters the class Reading in the Python module.
void bind_reading(pybind11::module_& module);

}  // namespace gc
