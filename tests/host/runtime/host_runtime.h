// The names of csrc/cuda/kernels/port.h for the CPU: what a kernel asks of a GPU is done by the scheduler. See port.h
// for what each name promises.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memory.h"
#include "race.h"
#include "scheduler.h"

#define GC_DEVICE inline
#define GC_KERNEL(max_threads, min_blocks) void
#define GC_UNROLL
#define GC_UNROLL_BY(n)

namespace gc::port {

GC_DEVICE int thread_index() { return host::current_place->thread; }
GC_DEVICE int block_threads() { return host::current_threads; }
GC_DEVICE int block_x() { return host::current_place->block_x; }
GC_DEVICE int block_y() { return host::current_place->block_y; }
GC_DEVICE int block_z() { return host::current_place->block_z; }
GC_DEVICE int grid_x() { return host::current_grid.x; }
GC_DEVICE int grid_y() { return host::current_grid.y; }
GC_DEVICE int grid_z() { return host::current_grid.z; }

template <int Site>
GC_DEVICE void sync_block() {
  if constexpr (Site != GC_DROP_SITE) host::barrier(Site);
}

template <int Site>
GC_DEVICE void fence_device() {
  if constexpr (Site != GC_DROP_SITE) host::fence(Site);
}

template <typename T>
GC_DEVICE T shuffle_xor(T value, int lane_mask) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle exchanges a register or two");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = host::shuffle(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// In steps over the bits of the lanes' indices: after each, the value lies in the lanes that agree with `lane` in one
// bit fewer.
template <typename T>
GC_DEVICE T shuffle(T value, int lane) {
  for (int mask = 1; mask < 32; mask <<= 1) {
    const T other = shuffle_xor(value, mask);
    if (((thread_index() ^ lane) & mask) != 0) value = other;
  }
  return value;
}

GC_DEVICE unsigned take_ticket(unsigned* counter) { return host::take_ticket(counter); }

GC_DEVICE void wait_for(const unsigned* counter, unsigned value) { host::wait_for(counter, value); }

inline constexpr bool kLaunchesOverlap = true;

template <int Site>
GC_DEVICE void wait_for_launch_before() {
  if constexpr (Site != GC_DROP_SITE) host::wait_for_launch_before(Site);
}

GC_DEVICE void let_next_launch_begin() { host::let_next_launch_begin(); }

GC_DEVICE void prefetch_line(const void* address) { host::prefetch(address); }

class SharedArena {
 public:
  SharedArena() { host::open_arena(); }
  // On a GPU a copy would hand out the same bytes again.
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  template <typename T>
  GC_DEVICE T* take(int count) {
    static_assert(alignof(T) <= 16, "arrays of the arena are aligned to 16 bytes");
    return static_cast<T*>(host::take_shared(ordinal_++, count, static_cast<int>(sizeof(T))));
  }

 private:
  int ordinal_ = 0;
};

template <int kBytes>
GC_DEVICE void stage(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "see port.h");
  host::stage(shared, global, kBytes);
}

template <int Site>
GC_DEVICE void await_staged() {
  if constexpr (Site != GC_DROP_SITE) host::await_staged(Site);
}

template <typename V>
GC_DEVICE V load_global(const V* address) {
  static_assert(std::is_trivially_copyable_v<V> && alignof(V) == sizeof(V), "a vector is aligned to its size");
  host::check_vector(address, sizeof(V));
  host::check_waited("reads", address);
  if constexpr (host::kRaceBuild) {
    V value;
    host::race::load(&value, address, sizeof(V));
    return value;
  } else {
    return *address;
  }
}

template <typename V>
GC_DEVICE void store_streaming(V* address, const V& value) {
  static_assert(std::is_trivially_copyable_v<V> && alignof(V) == sizeof(V), "a vector is aligned to its size");
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "see port.h");
  host::check_vector(address, sizeof(V));
  host::check_waited("writes", address);
  if constexpr (host::kRaceBuild) {
    host::race::store(address, &value, sizeof(V));
  } else {
    *address = value;
  }
}

GC_DEVICE void forget(unsigned& word) { asm volatile("" : "+r"(word)); }

GC_DEVICE float exp2(float x) { return ::exp2f(x); }
GC_DEVICE double exp2(double x) { return ::exp2(x); }
GC_DEVICE float sqrt(float x) { return ::sqrtf(x); }
GC_DEVICE double sqrt(double x) { return ::sqrt(x); }

}  // namespace gc::port
