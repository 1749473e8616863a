// The functions that code compiled with -fsanitize=thread calls, for the race checker instead of libtsan. Volatile
// accesses count as plain ones: volatile orders nothing.
#include <cstddef>

#include "race.h"

// One function a size and kind of access, as GCC names them.
#define GC_ACCESS(name, bytes, write)                                           \
  extern "C" void __tsan_##name(void* address) {                                \
    gc::host::race::access(address, bytes, write, __builtin_return_address(0)); \
  }
#define GC_ACCESSES(bytes)                                \
  GC_ACCESS(read##bytes, bytes, false)                    \
  GC_ACCESS(write##bytes, bytes, true)                    \
  GC_ACCESS(volatile_read##bytes, bytes, false)           \
  GC_ACCESS(volatile_write##bytes, bytes, true)           \
  GC_ACCESS(unaligned_read##bytes, bytes, false)          \
  GC_ACCESS(unaligned_write##bytes, bytes, true)          \
  GC_ACCESS(unaligned_volatile_read##bytes, bytes, false) \
  GC_ACCESS(unaligned_volatile_write##bytes, bytes, true)

GC_ACCESSES(1)
GC_ACCESSES(2)
GC_ACCESSES(4)
GC_ACCESSES(8)
GC_ACCESSES(16)

extern "C" void __tsan_read_range(void* address, std::size_t bytes) {
  gc::host::race::access(address, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, std::size_t bytes) {
  gc::host::race::access(address, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
