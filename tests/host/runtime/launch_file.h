// Lets the launch files of csrc/cuda run kernels on the CPU. hostbuild.py compiles their text with every
//
//   kernel<<<grid, threads, shared_bytes, stream>>>(args)   made   gc::host::launch_kernel(kernel, grid, ...)(args)
//
// so that what is tested includes the dispatch from a plan to a template and the launch's own numbers. Drivers say,
// with LaunchFiles, under which schedule launches run from now on, and get what a launch did wrong as an exception.
#pragma once

#include <cuda_runtime_api.h>

#include "scheduler.h"

namespace gc::host {

// The schedule of the launches to come, what the last one reported, and how many there were.
struct LaunchFiles {
  static Schedule schedule;
  static LaunchReport last;
  static int launches;
  static int early_launches;
  static bool refuse_early;  // launches with attributes fail, as where a driver does not know them
};

// What a kernel is allowed: 48 KB, until allow_all_shared_memory was called for it.
int shared_limit_of(const void* kernel);

template <typename Args>
class KernelLaunch {
 public:
  KernelLaunch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, bool early = false)
      : kernel_(kernel), grid_(grid), threads_(threads), shared_bytes_(shared_bytes), early_(early) {}

  void operator()(const Args& args) const {
    const Grid grid{static_cast<int>(grid_.x), static_cast<int>(grid_.y), static_cast<int>(grid_.z)};
    const int limit = shared_limit_of(reinterpret_cast<const void*>(kernel_));
    ++LaunchFiles::launches;
    LaunchFiles::early_launches += early_;
    LaunchFiles::last =
        host::launch(grid, threads_, shared_bytes_, LaunchFiles::schedule, [&] { kernel_(args); }, limit, early_);
  }

 private:
  void (*kernel_)(Args);
  dim3 grid_;
  int threads_;
  int shared_bytes_;
  bool early_;
};

template <typename Args>
KernelLaunch<Args> launch_kernel(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, cudaStream_t) {
  return {kernel, grid, threads, shared_bytes};
}

}  // namespace gc::host

// As cuda_runtime.h has it, which nvcc includes. With its one attribute, the launch begins early.
template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  const dim3 block = config->blockDim;
  if (gc::host::LaunchFiles::refuse_early) return cudaErrorNotSupported;
  if (config->numAttrs != 1 || config->attrs->id != cudaLaunchAttributeProgrammaticStreamSerialization ||
      config->attrs->val.programmaticStreamSerializationAllowed != 1 || block.y != 1 || block.z != 1) {
    return cudaErrorInvalidValue;
  }
  gc::host::KernelLaunch<Args>(kernel, config->gridDim, static_cast<int>(block.x),
                               static_cast<int>(config->dynamicSmemBytes), true)(args);
  return cudaSuccess;
}
