// The names of device.h for the CPU, on the fibers of tests/host; included by device.h. An asynchronous copy is done at
// once. Bulk copies, clusters, hints and timers have no counterpart: a kernel that comes to one fails.
#pragma once

namespace gc::lab {

inline void unsupported() { host::fail("the harness lacks this instruction"); }

// Lets the other fibers run until the word has come to this value.
inline void host_turn(const unsigned* word, unsigned value) { host::wait_for(word, value); }

// The scheduler wakes who waits for a word when it is counted up to what they wait for.
inline void host_store(unsigned* word, unsigned value) {
  *static_cast<volatile unsigned*>(word) = value - 1;
  host::take_ticket(word);
}

inline void publish(Cell* cell, unsigned value, unsigned tag) {
  cell->value = value;
  host_store(&cell->tag, tag);
}
inline Cell observe(const Cell* cell) { return *cell; }
inline void store_relaxed(unsigned* word, unsigned value) { *word = value; }
inline unsigned load_word(const unsigned* word) { return *word; }

// Flags go up by one each time.
inline void raise_flag(unsigned* flag, unsigned) { host::take_ticket(flag); }
inline bool await_count(const unsigned* word, unsigned target) {
  host::wait_for(word, target);
  return true;
}

// Release and acquire are a fence before and after.
inline void add_release(unsigned* word) {
  port::fence_device<kFenceBefore>();
  host::take_ticket(word);
}
inline bool await_count_acquire(const unsigned* word, unsigned target) {
  host::wait_for(word, target);
  port::fence_device<kFenceAfter>();
  return true;
}

// Barrier of the block; true if it is true for every thread (on the host no poll gives up, so it always is).
template <int Site>
bool sync_and(bool good) {
  port::sync_block<Site>();
  return good;
}

template <int Bytes>
void copy_async(void* shared, const void* global) {
  std::memcpy(shared, global, Bytes);
}
inline void commit_copies() {}
template <int Pending>
void await_copies() {}

inline void init_mbarrier(U64*, unsigned) { unsupported(); }
inline void fence_mbarrier_init() { unsupported(); }
inline void fence_async_proxy() { unsupported(); }
inline void arrive_expect(U64*, unsigned) { unsupported(); }
inline bool await_phase(U64*, unsigned) { return false; }
inline void bulk_load(void*, const void*, unsigned, U64*) { unsupported(); }

inline U64 global_timer() { return 0; }
inline U64 cycle_counter() { return 0; }

}  // namespace gc::lab
