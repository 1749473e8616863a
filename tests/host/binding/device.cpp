// What the binding asks of a device and of csrc/cuda/launch/counters.cpp, for launches that run on the host one by one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/launch/counters.h"
#include "launch_file.h"

namespace gc::cuda {

struct Counters::OnLoan {
  std::vector<unsigned> words;
};

// As many as a call asks for, zero at first. Launches must leave them so: another call could have them next.
Counters::Counters(int64_t count, int, cudaStream_t) {
  if (count == 0) return;
  loan_ = std::make_unique<OnLoan>();
  loan_->words.assign(static_cast<size_t>(count), 0);
  start_ = loan_->words.data();
}

Counters::~Counters() {
  if (loan_ == nullptr) return;
  if (std::any_of(loan_->words.begin(), loan_->words.end(), [](unsigned word) { return word != 0; })) {
    std::fputs("a launch has left its counters set\n", stderr);
    std::abort();
  }
}

}  // namespace gc::cuda

extern "C" int gc_launches() { return gc::host::LaunchFiles::launches; }
extern "C" int gc_early_launches() { return gc::host::LaunchFiles::early_launches; }

// An H100, but for the shared memory: what the harness gives a block.
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = gc::host::kMaxSharedOptIn;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
