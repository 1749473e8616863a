// Counters for the blocks of one launch to meet by: zero before it and, as every kernel resets its own, after it.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

namespace gc::cuda {

// Must be made before the launch that uses it, on the launch's stream and with its device current, and destroyed after
// the launch, which it marks the end of where the counters are on loan.
class Counters {
 public:
  Counters(int64_t count, int device, cudaStream_t stream);
  Counters(const Counters&) = delete;
  Counters& operator=(const Counters&) = delete;
  ~Counters();

  unsigned* get() const { return start_; }  // nullptr for none

 private:
  struct OnLoan;

  unsigned* start_ = nullptr;
  std::unique_ptr<OnLoan> loan_;  // for streams that have no region of their own
  at::Tensor filled_;             // where a graph cannot hold a region
};

}  // namespace gc::cuda
