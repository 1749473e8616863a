#include "memory.h"

#include <cstdlib>
#include <cstring>

#include "race.h"
#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gc::host {
namespace {

unsigned char poison = 0xff;

}  // namespace

void set_poison(unsigned char byte) { poison = byte; }
unsigned char current_poison() { return poison; }

void* allocate(const std::string& name, std::size_t bytes, std::size_t offset, Use use) {
  char* base = nullptr;
  if constexpr (kRaceBuild) {
    base = static_cast<char*>(race::allocate(name, bytes, offset, use));
  } else {
    base = static_cast<char*>(std::malloc(offset + bytes));  // 16-byte aligned
    if (base == nullptr) throw std::bad_alloc();
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(base, offset / 8 * 8);  // its granularity
#endif
  std::memset(base + offset, poison, bytes);
  return base + offset;
}

void release(void* memory, std::size_t offset) {
  char* const base = static_cast<char*>(memory) - offset;
  if constexpr (kRaceBuild) {
    race::release(base);
  } else {
    std::free(base);
  }
}

Traffic traffic_of(const void* memory) {
  if constexpr (kRaceBuild) return race::traffic_of(memory);
  return {};
}

std::string name_of_memory(const void* address) {
  if constexpr (kRaceBuild) return race::describe_memory(address);
  return "memory";
}

void prefetch(const void* address) {
#if defined(__SANITIZE_ADDRESS__)
  if (__asan_address_is_poisoned(address)) fail("out of bounds: a prefetch");
#endif
  if constexpr (kRaceBuild) race::prefetch(address);
}

void report_misaligned(const void* address, std::size_t bytes) {
  fail("misaligned: a vector of " + std::to_string(bytes) + " bytes at an address that is " +
       std::to_string(reinterpret_cast<std::uintptr_t>(address) % bytes) + " bytes off");
}

}  // namespace gc::host
