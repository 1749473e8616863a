// What the laboratory's kernels ask of a GPU beyond csrc/cuda/kernels/port.h: cells, asynchronous copies, mbarriers,
// clusters, cache hints, programmatic launches, timers. Free of the runtime API, so that NVRTC compiles it.
//
// An instruction that an architecture lacks becomes a trap there; the host asks the device before it launches such a
// kernel. With GC_HOST_RUN (the harness of tests/host) cells and waits run on fibers and an asynchronous copy is done
// at once; bulk copies, clusters, hints and timers have no counterpart there.
#pragma once

#include "cuda/kernels/port.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define LAB_BOTH __host__ __device__ inline
#else
#define LAB_BOTH inline
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define LAB_SM80(...) __VA_ARGS__
#else
#define LAB_SM80(...) ::gc::lab::unsupported()
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LAB_SM90(...) __VA_ARGS__
#else
#define LAB_SM90(...) ::gc::lab::unsupported()
#endif

namespace gc::lab {

using U64 = unsigned long long;

// Barriers of the laboratory's kernels, for port::sync_block.
enum LabSite : int { kSyncReady = 0, kSyncWritten = 1, kSyncMet = 2, kSyncRead = 3, kFenceBefore = 4, kFenceAfter = 5 };

struct alignas(16) Vec16 {
  unsigned word[4];
};

// A value and the number of the round that it belongs to, written and read as one 64-bit word.
struct alignas(8) Cell {
  unsigned value;
  unsigned tag;
};

// When a block began and ended what is measured, in nanoseconds of the GPU's global timer, and how many cycles of its
// multiprocessor that took.
struct Span {
  U64 begin;
  U64 end;
  U64 cycles;
};

// A poll gives up after so many tries (about a second): a mistake becomes a failure and not a hang.
constexpr unsigned kTries = 1u << 20;
// A wait on an mbarrier gives up after so long.
constexpr U64 kWaitLimitNs = 200 * 1000 * 1000;

// A number that looks random and differs from index to index (the finalizer of MurmurHash3).
LAB_BOTH unsigned random_word(unsigned index) {
  unsigned h = index * 0x9e3779b9u + 0x7f4a7c15u;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// What memory is filled with: word k of a vector. One random word a vector is enough and takes little arithmetic.
LAB_BOTH unsigned pattern_word(unsigned vector_index, int k) { return random_word(vector_index) + k * 0x9e3779b9u; }

// Sums of words weighted by this notice a word in the wrong place.
LAB_BOTH unsigned weight(unsigned index) { return 2 * index + 1; }

#if defined(GC_HOST_RUN)
}  // namespace gc::lab
#include "device_host.h"
namespace gc::lab {
#else

GC_DEVICE void unsupported() { asm volatile("trap;"); }

GC_DEVICE void host_turn(const unsigned*, unsigned) {}

GC_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// --- cells and counters ---

GC_DEVICE void publish(Cell* cell, unsigned value, unsigned tag) {
  const U64 bits = static_cast<U64>(tag) << 32 | value;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(cell), "l"(bits) : "memory");
}

GC_DEVICE Cell observe(const Cell* cell) {
  U64 bits;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(bits) : "l"(cell) : "memory");
  return {static_cast<unsigned>(bits), static_cast<unsigned>(bits >> 32)};
}

GC_DEVICE void store_relaxed(unsigned* word, unsigned value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

GC_DEVICE unsigned load_relaxed(const unsigned* word) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// What other blocks have written before a barrier of the grid, past the first-level cache.
GC_DEVICE unsigned load_word(const unsigned* word) { return load_relaxed(word); }

GC_DEVICE void raise_flag(unsigned* flag, unsigned value) { store_relaxed(flag, value); }

// Polls until the word has come to `target`. False: it did not in so many tries.
GC_DEVICE bool await_count(const unsigned* word, unsigned target) {
  for (unsigned tries = 0; tries < kTries; ++tries) {
    if (load_relaxed(word) >= target) return true;
  }
  return false;
}

GC_DEVICE void add_release(unsigned* word) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(word) : "memory");
}

// As await_count; the load itself orders what follows.
GC_DEVICE bool await_count_acquire(const unsigned* word, unsigned target) {
  for (unsigned tries = 0; tries < kTries; ++tries) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    if (value >= target) return true;
  }
  return false;
}

template <int Site>
GC_DEVICE bool sync_and(bool good) {
  return __syncthreads_and(good) != 0;
}

// --- asynchronous copies to shared memory, sm_80 on ---

template <int Bytes>
GC_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Bytes == 16) {
    LAB_SM80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                          "l"(global) : "memory"));
  } else {
    LAB_SM80(asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global),
                          "n"(Bytes) : "memory"));
  }
}

GC_DEVICE void commit_copies() { LAB_SM80(asm volatile("cp.async.commit_group;" :: : "memory")); }

// Waits until at most `Pending` of this thread's groups are still under way.
template <int Pending>
GC_DEVICE void await_copies() {
  LAB_SM80(asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"));
}

// --- mbarriers and bulk copies, sm_90 on ---

GC_DEVICE void init_mbarrier(U64* barrier, unsigned arrivals) {
  LAB_SM90(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory"));
}

// Orders this thread's ordinary accesses of shared memory before asynchronous copies of it.
GC_DEVICE void fence_async_proxy() { LAB_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

// Makes initialised mbarriers visible to the cluster and to the asynchronous proxy; a barrier must follow.
GC_DEVICE void fence_mbarrier_init() {
  LAB_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
  fence_async_proxy();
}

// One arrival, and so many bytes that the phase still waits for. A phase takes less than 2^20 bytes.
GC_DEVICE void arrive_expect(U64* barrier, unsigned bytes) {
  LAB_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                        "r"(bytes) : "memory"));
}

GC_DEVICE U64 global_timer() {
  U64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

GC_DEVICE U64 cycle_counter() {
  U64 now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

GC_DEVICE bool test_phase(U64* barrier, unsigned parity) {
  unsigned done = 0;
  LAB_SM90(
      asm volatile("{\n\t.reg .pred p;\n\t"
                   "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                   "selp.u32 %0, 1, 0, p;\n\t}" : "=r"(done) : "r"(shared_address(barrier)),
                   "r"(parity) : "memory"));
  return done != 0;
}

// Waits for the end of the phase with this parity. False: it did not come in time.
GC_DEVICE bool await_phase(U64* barrier, unsigned parity) {
  if (test_phase(barrier, parity)) return true;
  const U64 begin = global_timer();
  while (!test_phase(barrier, parity)) {
    if (global_timer() - begin > kWaitLimitNs) return false;
  }
  return true;
}

// `bytes`, source and target are multiples of 16. The mbarrier counts the bytes as they arrive.
GC_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, U64* barrier) {
  LAB_SM90(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                            shared_address(shared)),
                        "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory"));
}

GC_DEVICE void bulk_store(void* global, const void* shared, unsigned bytes) {
  LAB_SM90(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                        "r"(shared_address(shared)), "r"(bytes) : "memory"));
}

// Waits until all bulk stores of this thread are done, so that their source may go.
GC_DEVICE void await_bulk_stores() {
  LAB_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
  LAB_SM90(asm volatile("cp.async.bulk.wait_group 0;" :: : "memory"));
}

// --- clusters, sm_90 on ---

GC_DEVICE int cluster_rank() {
  unsigned rank = 0;
  LAB_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return static_cast<int>(rank);
}

GC_DEVICE int cluster_blocks() {
  unsigned blocks = 1;
  LAB_SM90(asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks)));
  return static_cast<int>(blocks);
}

// Barrier of all threads of the cluster; orders their memory accesses, each other's shared memory included.
GC_DEVICE void sync_cluster() {
  LAB_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
  LAB_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

// Where an address of our shared memory lies in that of the block with this rank.
GC_DEVICE unsigned remote_address(const void* shared, int rank) {
  unsigned address = 0;
  LAB_SM90(
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank)));
  return address;
}

GC_DEVICE void store_remote(unsigned address, unsigned value) {
  LAB_SM90(asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory"));
}

// Stores 4 bytes to a block of the cluster and counts them on that block's mbarrier.
GC_DEVICE void store_remote_async(unsigned address, unsigned value, unsigned barrier) {
  LAB_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
                        "r"(value), "r"(barrier) : "memory"));
}

// --- caches ---

GC_DEVICE void prefetch_line(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory"); }

GC_DEVICE void prefetch_bulk(const void* global, unsigned bytes) {
  LAB_SM90(asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory"));
}

enum class Hint { kNone, kEvictFirst, kEvictLast };

// 16 bytes past the first-level cache, with a wish for the second.
template <Hint H>
GC_DEVICE Vec16 load_hinted(const Vec16* address) {
  Vec16 v = {};
  if constexpr (H == Hint::kNone) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(address)
                 : "memory");
  } else {
    [[maybe_unused]] U64 policy = 0;
    if constexpr (H == Hint::kEvictFirst) {
      LAB_SM80(asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)));
    } else {
      LAB_SM80(asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy)));
    }
    LAB_SM80(asm volatile("ld.global.cg.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(v.word[0]),
                          "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(address), "l"(policy) : "memory"));
  }
  return v;
}

// --- programmatic dependent launch, sm_90 on ---

GC_DEVICE void wait_for_previous_kernel() { LAB_SM90(asm volatile("griddepcontrol.wait;" :: : "memory")); }
GC_DEVICE void allow_next_kernel() { LAB_SM90(asm volatile("griddepcontrol.launch_dependents;" :: : "memory")); }

#endif  // GC_HOST_RUN

// Notes the time at which the block's first thread comes here.
GC_DEVICE void note_begin(Span* spans) {
  if (spans == nullptr || port::thread_index() != 0) return;
  Span& span = spans[port::block_x()];
  span.begin = global_timer();
  span.cycles = cycle_counter();
}

// Notes when the whole block has come here.
GC_DEVICE void note_end(Span* spans) {
  if (spans == nullptr) return;
  port::sync_block<kSyncWritten>();
  if (port::thread_index() != 0) return;
  Span& span = spans[port::block_x()];
  const U64 cycles = cycle_counter();
  span.end = global_timer();
  span.cycles = cycles - span.cycles;
}

// Barrier of all blocks of the grid, which all run: one counter, which only grows. `target` is its value once all have
// arrived. False: that did not come in time.
GC_DEVICE bool meet_by_counter(unsigned* counter, unsigned target) {
  bool good = true;
  port::sync_block<kSyncWritten>();
  if (port::thread_index() == 0) {
    port::fence_device<kFenceBefore>();
    port::take_ticket(counter);
    good = await_count(counter, target);
    port::fence_device<kFenceAfter>();
  }
  return sync_and<kSyncMet>(good);
}

}  // namespace gc::lab
