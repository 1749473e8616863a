// In place of torch's: a launch on the host that fails throws by itself.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                                     \
  do {                                                                                           \
    const cudaError_t status_of_call = (call);                                                   \
    TORCH_CHECK(status_of_call == cudaSuccess, "CUDA error ", int{status_of_call}, ": ", #call); \
  } while (false)
