// torch's own, but that kernels for CUDA become those of the CPU, in place of the ones that are there.
#pragma once

#include_next <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, k, m) _TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
