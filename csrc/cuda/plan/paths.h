// The switch of the newer paths of a launch (kernels/paths.h). A path becomes the default of an architecture when a
// file in bench/results shows its tests, sanitizers and times there. Until then it is taken on request only: by the
// environment variable GC_CUDA_PATHS, or choose_paths.
#pragma once

#include <optional>
#include <string>

#include "cuda/kernels/paths.h"

namespace gc {

// "staged_grad,tiles_ahead", or "none".
std::string names_of(Paths paths);
// The set of such a list, of "none" or of "all". Throws std::invalid_argument, with the names that there are.
Paths paths_named(const std::string& list);

// Those that were measured on GPUs of this compute capability, 90 for 9.0, and found faster.
Paths default_paths(int compute_capability);
// Those that launches on such GPUs go: what is chosen, or the defaults; without what such GPUs cannot do.
Paths paths_on(int compute_capability);

// For all launches of this process from now on; nullopt: the defaults. At first what GC_CUDA_PATHS says.
void choose_paths(std::optional<Paths> paths);
std::optional<Paths> chosen_paths();

}  // namespace gc
