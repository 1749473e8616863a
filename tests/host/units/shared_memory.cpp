// Leave for shared memory, with a CUDA runtime of this file in place of the real one.
#include "cuda/launch/shared_memory.h"

#include <atomic>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"

namespace {

constexpr int kMost = 227 * 1024;
constexpr size_t kStatic = 1000;
thread_local int device = 0;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
std::atomic<bool> failing{false};
std::mutex mutex;
std::map<std::pair<const void*, int>, int> asked;  // how often CUDA was asked for leave

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  REQUIRE(attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin);
  *value = kMost;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  REQUIRE(mode == cudaStreamCaptureModeRelaxed);
  attributes->sharedSizeBytes = kStatic;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  REQUIRE(mode == cudaStreamCaptureModeRelaxed);
  REQUIRE(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize);
  REQUIRE(value == kMost - static_cast<int>(kStatic));  // whoever asks, and for whatever launch
  if (failing) return cudaErrorInvalidDeviceFunction;
  const std::lock_guard<std::mutex> lock(mutex);
  ++asked[{kernel, device}];
  return cudaSuccess;
}

}  // extern "C"

namespace {

char kernels[8000];  // more than can be remembered

void allow(int kernel) { REQUIRE(gc::allow_all_shared_memory(&kernels[kernel]) == cudaSuccess); }

int times(int kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  return asked[{&kernels[kernel], device}];
}

void once_for_each_kernel_and_device() {
  for (device = 0; device < 3; ++device) {
    for (int kernel = 0; kernel < 16 * 40; kernel += 16) {
      for (int i = 0; i < 3; ++i) allow(kernel);
      REQUIRE(times(kernel) == 1);
    }
  }
  device = 0;
}

void a_failure_is_reported_and_not_remembered() {
  constexpr int kKernel = 16 * 50;
  failing = true;
  REQUIRE(gc::allow_all_shared_memory(&kernels[kKernel]) == cudaErrorInvalidDeviceFunction);
  REQUIRE(mode == cudaStreamCaptureModeGlobal);
  failing = false;
  allow(kKernel);
  REQUIRE(times(kKernel) == 1);
}

void a_device_beyond_those_remembered_is_asked_for_each_time() {
  device = 64;
  for (int i = 0; i < 3; ++i) allow(0);
  REQUIRE(times(0) == 3);
  device = 0;
}

void threads_at_once() {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([thread] {
      for (int round = 0; round < 3; ++round) {
        for (int kernel = 16 * 60; kernel < 16 * 160; kernel += 16) {
          allow(kernel);
          REQUIRE(times(kernel) >= 1);  // before the launch that needs it
        }
      }
      REQUIRE(mode == cudaStreamCaptureModeGlobal);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int kernel = 16 * 60; kernel < 16 * 160; kernel += 16) {
    REQUIRE(times(kernel) <= 4);
    const int before = times(kernel);
    allow(kernel);
    REQUIRE(times(kernel) == before);
  }
}

void more_kernels_than_can_be_remembered() {
  for (int kernel = 0; kernel < 8000; ++kernel) allow(kernel);
  for (int kernel = 0; kernel < 8000; ++kernel) {
    allow(kernel);
    REQUIRE(times(kernel) >= 1);
  }
}

}  // namespace

int main() {
  once_for_each_kernel_and_device();
  a_failure_is_reported_and_not_remembered();
  a_device_beyond_those_remembered_is_asked_for_each_time();
  threads_at_once();
  more_kernels_than_can_be_remembered();
  std::puts("all cases passed");
}
