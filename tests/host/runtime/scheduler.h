// Runs one launch of a kernel: every thread a fiber, several blocks in flight, and a report instead of a wrong answer
// where a GPU would hang or fault. A fiber runs until it comes to a barrier, a shuffle, an
// atomic or a wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "schedule.h"

namespace gc::host {

struct Grid {
  int x = 1;
  int y = 1;
  int z = 1;
};

inline constexpr int kWarpThreads = 32;
inline constexpr int kMaxBlockThreads = 1024;
inline constexpr int kMaxGridYZ = 65535;
// Dynamic shared memory that every GPU gives without being asked for more.
inline constexpr int kSharedLimit = 48 * 1024;
// What a GPU gives when asked: the least of those that are supported (sm_75).
inline constexpr int kMaxSharedOptIn = 64 * 1024;
// The most that any gives (sm_90).
inline constexpr int kMostSharedOptIn = 227 * 1024;
inline constexpr int kMaxSites = 256;

// What a launch did wrong. The message begins with its kind: "data race", "deadlock", "divergent barrier", "shared
// memory", "launch limits", "out of bounds", "early start", ...
class LaunchError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a thread is, and what it asks of the scheduler. Kernels see it through gc::port.
struct Place {
  int thread;
  int block_x, block_y, block_z;
  int block;           // its linear index: x runs fastest
  bool waited = true;  // false: in a launch that begins early, before it has waited for the launch before
};

// The running fiber's place and launch; only valid inside a kernel.
extern const Place* current_place;
extern Grid current_grid;
extern int current_threads;

struct LaunchReport {
  int shared_bytes = 0;  // the most dynamic shared memory that a block took, each array rounded up to 16 bytes
  bool early = false;
  bool lets_next_begin = true;  // every block has said so
};

// Runs `kernel` once in every thread. Throws LaunchError; memory that the kernel uses stays as it was at that moment.
// early: the launch before may still be running, until a thread has waited for it.
LaunchReport launch(Grid grid, int threads, int shared_bytes, const Schedule& schedule,
                    const std::function<void()>& kernel, int shared_limit = kSharedLimit, bool early = false);

// Stops the launch with this message. Outside of a launch it throws.
[[noreturn]] void fail(const std::string& message);

// "block 3 (1, 0, 0) thread 17"
std::string describe(int block, int thread);

// --- what gc::port is made of ---
void barrier(int site);
void fence(int site);
std::uint64_t shuffle(std::uint64_t bits, int lane_mask);
unsigned take_ticket(unsigned* counter);
void wait_for(const unsigned* counter, unsigned value);
void wait_for_launch_before(int site);
void let_next_launch_begin();
// Before an access of the running thread to global memory.
[[noreturn]] void report_not_waited(const char* does, const void* address);
inline void check_waited(const char* does, const void* address) {
  if (!current_place->waited) report_not_waited(does, address);
}
// A copy to shared memory that is done at once, later or when it is waited for, by the schedule; until it is waited for,
// its target must not be touched.
void stage(void* to, const void* from, std::size_t bytes);
void await_staged(int site);
void open_arena();
void* take_shared(int ordinal, int count, int element_bytes);

// --- the mutation test ---
// Barriers, fences and waits with this site do nothing from now on; -1 for none.
void drop_site(int site);
// Which sites launches have come to (dropped ones too).
std::vector<int> sites_reached();

}  // namespace gc::host
