// Leave for kernels to use more than 48 KB of shared memory.
#pragma once

#include <cuda_runtime_api.h>

namespace gc {

// Allows the kernel all the shared memory that a block can have on the current device. Always the same number: were it
// what a launch needs, another thread could lower it between this call and that launch. Asks CUDA once for each kernel
// and device; from then on it takes no lock.
cudaError_t allow_all_shared_memory(const void* kernel);

}  // namespace gc
