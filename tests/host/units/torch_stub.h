// The little of torch that csrc/cuda/launch/counters.cpp uses, for a program without torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace c10 {

using DeviceIndex = int8_t;
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OutOfMemoryError : Error {
  using Error::Error;
};

template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

namespace cuda {

struct CUDAGuard {
  explicit CUDAGuard(DeviceIndex) {}
  ~CUDAGuard() {}  // not trivial: an unused one is no mistake
};

struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode mode) : mode_(mode) {
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~CUDAStreamCaptureModeGuard() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CUDAStreamCaptureModeGuard(const CUDAStreamCaptureModeGuard&) = delete;
  CUDAStreamCaptureModeGuard& operator=(const CUDAStreamCaptureModeGuard&) = delete;

 private:
  cudaStreamCaptureMode mode_;
};

namespace CUDACachingAllocator {
void emptyCache();  // the program's
}  // namespace CUDACachingAllocator

}  // namespace cuda
}  // namespace c10

#define C10_CUDA_CHECK(call)                                                               \
  do {                                                                                     \
    const cudaError_t status_of_call = (call);                                             \
    if (status_of_call != cudaSuccess) throw ::c10::Error(std::to_string(status_of_call)); \
  } while (false)
#define TORCH_CHECK_WITH(type, condition, ...)                        \
  do {                                                                \
    if (!(condition)) throw ::c10::type(::c10::text_of(__VA_ARGS__)); \
  } while (false)

namespace at {

inline constexpr int kCUDA = 1, kInt = 3;
struct Device {
  Device(int, c10::DeviceIndex) {}
};
struct TensorOptions {
  TensorOptions device(Device) const { return *this; }
  TensorOptions dtype(int) const { return *this; }
};
struct Tensor {
  std::shared_ptr<std::vector<int>> data;
  void* data_ptr() const { return data->data(); }
};
inline Tensor zeros(std::initializer_list<int64_t> sizes, TensorOptions) {
  return {std::make_shared<std::vector<int>>(*sizes.begin())};
}

}  // namespace at
