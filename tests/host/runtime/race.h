// The race checker (race build only). Kernels are compiled with -fsanitize=thread and call __tsan_read4 and its like at
// each access to memory; libtsan is not linked, these functions are the harness's own (tsan_hooks.cpp). Of what they
// report, accesses to the harness's buffers and shared arrays count:
//   - two accesses to the same bytes, one of them a write, must be ordered by barriers, or by fences around a ticket;
//   - bytes must lie within the allocation; inputs are not written; outputs are not read before they are written;
//   - in a launch that begins early, a thread touches nothing but shared arrays before it has waited for the launch
//     before. That is stricter than a GPU, where it could read what none of the operator's launches writes.
// Since order is derived from barriers and fences and not from time, a missing one is found under any schedule in which
// both accesses happen.
//
//   - the target of a staged copy must not be touched before the thread that staged it has awaited it.
//
// The model. sync_block orders the memory of its block. Shuffles and tickets order nothing. A fence (__threadfence is
// sequentially consistent) makes what its thread knows releasable; a ticket taken after it, by the thread or, a barrier
// later, by another of the block, publishes that; who takes a later ticket of the same counter, again itself or a
// barrier later, and then fences, has acquired it. A counter may be reset without a fence by the block that took its
// last ticket.
#pragma once

#include <cstddef>
#include <string>

#include "memory.h"

namespace gc::host::race {

void* allocate(const std::string& name, std::size_t bytes, std::size_t offset, Use use);
void release(void* base);
Traffic traffic_of(const void* memory);
std::string describe_memory(const void* address);

// Called by the scheduler.
void begin_launch(int blocks, int threads);
void end_launch();
void barrier(int block);  // all threads of the block have come to it
void fence(int block, int thread);
void ticket(int block, int thread, const unsigned* counter);
void observe(int block, int thread, const unsigned* counter);  // has waited for it

// An access of the running thread; `pc` says where the kernel made it. Ignored outside of kernels and for other memory.
void access(const void* address, std::size_t bytes, bool write, const void* pc);

// By the running thread; counted.
void prefetch(const void* address);

// A staged copy: the source is read, and the target may not be touched until end_copy, when the thread writes it.
void begin_copy(const void* to, const void* from, std::size_t bytes);
void end_copy(const void* to, std::size_t bytes);

// An access, and the copy; the bytes are counted as they are asked for, whatever the compiler does with the value.
void load(void* to, const void* from, std::size_t bytes);
void store(void* to, const void* from, std::size_t bytes);

}  // namespace gc::host::race
