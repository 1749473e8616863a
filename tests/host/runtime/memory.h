// The memory that kernels see. Every global buffer and every shared array is an allocation of its own and of its exact
// size, so that AddressSanitizer, or in the race build the harness, sees the first byte past its end; fresh memory is
// poisoned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace gc::host {

#if defined(GC_HOST_RACE)
inline constexpr bool kRaceBuild = true;
#else
inline constexpr bool kRaceBuild = false;
#endif

enum class Use {
  kInput,   // filled by the caller, not to be written by a kernel
  kOutput,  // poisoned, not to be read by a kernel before it is written
  kState,   // filled by the caller, read and written by kernels
  kShared,  // an array of a block: as kOutput
};

// Bytes that kernels have moved from and to a buffer, as they asked for them. Counted in the race build only.
struct Traffic {
  std::uint64_t read = 0;
  std::uint64_t written = 0;
  // Of those read, without what the same block of the launch was the last to read: a GPU has that in its first-level
  // cache, or hands one load to a whole warp.
  std::uint64_t fetched = 0;
  std::uint64_t prefetched = 0;  // cache lines, as often as they were asked for
};

// What fresh memory holds from now on: Schedule::poison().
void set_poison(unsigned char byte);
unsigned char current_poison();

// At least 16-byte aligned, plus `offset` bytes.
void* allocate(const std::string& name, std::size_t bytes, std::size_t offset, Use use);
void release(void* memory, std::size_t offset);
Traffic traffic_of(const void* memory);
// "x, byte 16 of 64"; in builds other than the race build "memory".
std::string name_of_memory(const void* address);

// Moves no data, but must lie within a buffer.
void prefetch(const void* address);

// A vector load or store must be aligned to its size: a GPU would fault.
void report_misaligned(const void* address, std::size_t bytes);
inline void check_vector(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) report_misaligned(address, bytes);
}

// A global buffer of `count` elements. `misaligned` shifts its start by so many elements off the 16-byte boundary.
template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer(std::string name, std::size_t count, Use use, int misaligned = 0)
      : name_(std::move(name)),
        count_(count),
        offset_(misaligned * sizeof(T)),
        data_(static_cast<T*>(allocate(name_, count * sizeof(T), offset_, use))) {}

  Buffer(std::string name, const std::vector<T>& values, Use use, int misaligned = 0)
      : Buffer(std::move(name), values.size(), use, misaligned) {
    for (std::size_t i = 0; i < count_; ++i) data_[i] = values[i];
  }

  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(data_, offset_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }
  std::size_t bytes() const { return count_ * sizeof(T); }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }
  const std::string& name() const { return name_; }

  // Since the buffer was made. Zero except in the race build.
  Traffic traffic() const { return traffic_of(data_); }

 private:
  std::string name_;
  std::size_t count_;
  std::size_t offset_;
  T* data_;
};

}  // namespace gc::host
