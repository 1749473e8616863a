#include "launch_file.h"

#include <map>

namespace gc::host {
namespace {

std::map<const void*, int> shared_limits;

}  // namespace

Schedule LaunchFiles::schedule;
LaunchReport LaunchFiles::last;
int LaunchFiles::launches = 0;

int shared_limit_of(const void* kernel) {
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? kSharedLimit : found->second;
}

}  // namespace gc::host

// The part of the CUDA runtime that launch files call.
extern "C" cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > gc::host::kMaxSharedOptIn) {
    return cudaErrorInvalidValue;
  }
  gc::host::shared_limits[kernel] = value;
  return cudaSuccess;
}

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
