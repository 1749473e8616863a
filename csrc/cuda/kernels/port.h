// Everything that differs between the toolchains that compile the kernels: nvcc, NVRTC and, for the tests that run the
// kernels on a CPU, g++. Kernels reach the machine through the names in gc::port and nothing else, so the text that is
// checked under sanitizers and a race checker is the text that runs on a GPU.
//
// With GC_HOST_RUN defined, host_runtime.h (tests/host) supplies the same names on fibers.
#pragma once

// A barrier, fence or wait with this number is compiled out (the mutation test of tests/host proves each necessary).
#ifndef GC_DROP_SITE
#define GC_DROP_SITE -1
#endif

#if defined(GC_HOST_RUN)
#include "host_runtime.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define GC_DEVICE __device__ __forceinline__
#define GC_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define GC_UNROLL _Pragma("unroll")
#define GC_PRAGMA(text) _Pragma(#text)
#define GC_UNROLL_BY(n) GC_PRAGMA(unroll n)

namespace gc::port {

GC_DEVICE int thread_index() { return threadIdx.x; }  // blocks are one-dimensional
GC_DEVICE int block_threads() { return blockDim.x; }
GC_DEVICE int block_x() { return blockIdx.x; }
GC_DEVICE int block_y() { return blockIdx.y; }
GC_DEVICE int block_z() { return blockIdx.z; }
GC_DEVICE int grid_x() { return gridDim.x; }
GC_DEVICE int grid_y() { return gridDim.y; }
GC_DEVICE int grid_z() { return gridDim.z; }

// Barrier of all threads of the block; orders their shared and global memory accesses.
template <int Site>
GC_DEVICE void sync_block() {
  if constexpr (Site != GC_DROP_SITE) __syncthreads();
}

// Orders this thread's global memory accesses as seen by every thread of the device.
template <int Site>
GC_DEVICE void fence_device() {
  if constexpr (Site != GC_DROP_SITE) __threadfence();
}

// The value of the lane whose index differs in the bits of `lane_mask`. All 32 lanes must take part.
// It exchanges a register; it does not order memory.
template <typename T>
GC_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The value of that lane, the same one for the whole warp.
template <typename T>
GC_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Takes the next ticket: returns the counter's old value. Relaxed: it does not order other accesses.
GC_DEVICE unsigned take_ticket(unsigned* counter) { return atomicAdd(counter, 1u); }

// Waits until the counter is at least `value`. Relaxed, as take_ticket. Only for what blocks that run already will do.
GC_DEVICE void wait_for(const unsigned* counter, unsigned value) {
  while (*static_cast<const volatile unsigned*>(counter) < value) __nanosleep(32);
}

// Launches that overlap (Path::kEarlyStart): from sm_90 on a launch may begin while the one before it ends.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kLaunchesOverlap = true;
#else
inline constexpr bool kLaunchesOverlap = false;
#endif

// In a launch that has begun early: returns when the launch before is complete and this thread sees all that it wrote.
// In any other launch at once. A launch after this one knows of the launches before only through this one, so no thread
// may leave without it.
template <int Site>
GC_DEVICE void wait_for_launch_before() {
  if constexpr (kLaunchesOverlap && Site != GC_DROP_SITE) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// When every block of this launch has come here or has left, the next launch may begin, if it is one that begins early.
GC_DEVICE void let_next_launch_begin() {
  if constexpr (kLaunchesOverlap) asm volatile("griddepcontrol.launch_dependents;");
}

// Has the cache line of this address come to the second-level cache. Allowed before wait_for_launch_before.
GC_DEVICE void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// Dynamic shared memory, handed out array by array in the same order by every thread of the block. Its
// plan takes the same arrays from a CountingArena. On the host each array is an allocation of its own, so an overrun
// cannot stay unseen.
class SharedArena {
 public:
  template <typename T>
  GC_DEVICE T* take(int count) {
    extern __shared__ __align__(16) unsigned char gc_shared_memory[];
    T* const array = reinterpret_cast<T*>(gc_shared_memory + used_);
    used_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return array;
  }

 private:
  int used_ = 0;
};

// A trivially copyable vector of 2, 4, 8 or 16 bytes, aligned to its size, moved by one instruction.
template <typename V>
GC_DEVICE V load_global(const V* address) {
  return *address;
}

// Starts to copy kBytes from global to shared memory, both aligned to as many, and takes no registers meanwhile. What
// it writes may be read after the await_staged that follows, by other threads after a barrier then. Before sm_80 it is
// done at once.
template <int kBytes>
GC_DEVICE void stage(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "a copy has 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(shared) = *static_cast<const uint2*>(global);
  } else {
    *static_cast<unsigned*>(shared) = *static_cast<const unsigned*>(global);
  }
#endif
}

// Waits until all that this thread has staged is there.
template <int Site>
GC_DEVICE void await_staged() {
#if __CUDA_ARCH__ >= 800
  if constexpr (Site != GC_DROP_SITE) asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// For data that no kernel reads again soon: first to leave the caches.
template <typename V>
GC_DEVICE void store_streaming(V* address, const V& value) {
  if constexpr (sizeof(V) == 16) {
    __stcs(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&value));
  } else if constexpr (sizeof(V) == 8) {
    __stcs(reinterpret_cast<uint2*>(address), *reinterpret_cast<const uint2*>(&value));
  } else if constexpr (sizeof(V) == 4) {
    __stcs(reinterpret_cast<unsigned*>(address), *reinterpret_cast<const unsigned*>(&value));
  } else {
    static_assert(sizeof(V) == 2, "a vector has 2, 4, 8 or 16 bytes");
    __stcs(reinterpret_cast<unsigned short*>(address), *reinterpret_cast<const unsigned short*>(&value));
  }
}

// Makes the compiler forget where a register's value came from, so that it does not keep what it derived from it.
GC_DEVICE void forget(unsigned& word) { asm volatile("" : "+r"(word)); }

GC_DEVICE float exp2(float x) { return exp2f(x); }
GC_DEVICE double exp2(double x) { return ::exp2(x); }
GC_DEVICE float sqrt(float x) { return sqrtf(x); }
GC_DEVICE double sqrt(double x) { return ::sqrt(x); }

}  // namespace gc::port
#endif
