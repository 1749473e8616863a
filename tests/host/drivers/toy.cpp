// Toy kernels that test the harness itself: what it must find, and what it must let pass. A case whose name begins with
// "bad_" has a bug in its kernel and must fail; tests/host/test_runtime.py says with which message.
#include <numeric>

#include "cases.h"
#include "port.h"

namespace {

using namespace gc;

enum ToySite : int {
  kFill,
  kReuse,
  kRelease,
  kBeforeTicket,
  kAfterTicket,
  kAcquire,
  kAwait,
  kStagedByAll,
  kRefill,
  kWait
};

// out[block] = sum of x over the block's threads. Shared memory is used twice, so both barriers are needed.
struct BlockSumArgs {
  const float* x;  // [blocks, threads]
  float* out;      // [blocks, 2]: the sum, and the sum of the squares
};

GC_KERNEL(128, 1) block_sum(const BlockSumArgs args) {
  port::SharedArena arena;
  float* const values = arena.take<float>(port::block_threads());
  const int thread = port::thread_index();
  const float own = args.x[port::block_x() * port::block_threads() + thread];
  for (int power = 1; power <= 2; ++power) {
    values[thread] = power == 1 ? own : own * own;
    port::sync_block<kFill>();
    if (thread == 0) {
      float sum = 0;
      for (int i = 0; i < port::block_threads(); ++i) sum += values[i];
      args.out[port::block_x() * 2 + power - 1] = sum;
    }
    port::sync_block<kReuse>();
  }
}

void run_block_sum(const host::Schedule& schedule) {
  const int blocks = 5, threads = 96;
  host::Buffer<float> x("x", blocks * threads, host::Use::kInput);
  host::Buffer<float> out("out", blocks * 2, host::Use::kOutput);
  for (int i = 0; i < blocks * threads; ++i) x[i] = static_cast<float>(i % 7);
  const auto report =
      host::launch({blocks}, threads, threads * 4, schedule, [&] { block_sum({x.data(), out.data()}); });
  host::require(report.shared_bytes == threads * 4, "shared bytes");
  for (int b = 0; b < blocks; ++b) {
    double sum = 0, squares = 0;
    for (int i = 0; i < threads; ++i) {
      sum += x[b * threads + i];
      squares += x[b * threads + i] * x[b * threads + i];
    }
    host::require_close("sum", out[b * 2], sum, 0);
    host::require_close("squares", out[b * 2 + 1], squares, 0);
  }
  if (host::kRaceBuild) {
    host::require(x.traffic().read == x.bytes() && x.traffic().written == 0, "traffic of x");
    host::require(out.traffic().read == 0 && out.traffic().written == out.bytes(), "traffic of out");
  }
}

// Each block writes its part; the last to arrive adds them up in order.
struct LastBlockArgs {
  double* part;       // [blocks, threads]
  double* total;      // [threads]
  unsigned* counter;  // 0, and 0 again
  bool every_thread_fences;
};

GC_KERNEL(64, 1) last_block(const LastBlockArgs args) {
  port::SharedArena arena;
  bool* const last = arena.take<bool>(1);
  const int thread = port::thread_index(), threads = port::block_threads(), blocks = port::grid_y();
  args.part[port::block_y() * threads + thread] = port::block_y() * 1000 + thread;
  // Two ways to do it right: thread 0 fences for all once they have met, or each fences before they meet.
  if (args.every_thread_fences) port::fence_device<kRelease>();
  port::sync_block<kBeforeTicket>();
  if (thread == 0) {
    if (!args.every_thread_fences) port::fence_device<kRelease>();
    *last = port::take_ticket(args.counter) == static_cast<unsigned>(blocks - 1);
    if (*last) *args.counter = 0;
    if (!args.every_thread_fences) port::fence_device<kAcquire>();
  }
  port::sync_block<kAfterTicket>();
  if (!*last) return;
  if (args.every_thread_fences) port::fence_device<kAcquire>();
  double sum = 0;
  for (int b = 0; b < blocks; ++b) sum += args.part[b * threads + thread];
  args.total[thread] = sum;
}

void run_last_block(const host::Schedule& schedule, bool every_thread_fences) {
  const int blocks = 9, threads = 64;
  host::Buffer<unsigned> counter("counter", std::vector<unsigned>{0}, host::Use::kState);
  for (int repeat = 0; repeat < 2; ++repeat) {
    host::Buffer<double> part("part", blocks * threads, host::Use::kOutput);
    host::Buffer<double> total("total", threads, host::Use::kOutput);
    host::launch({1, blocks, 1}, threads, 16, schedule,
                 [&] { last_block({part.data(), total.data(), counter.data(), every_thread_fences}); });
    for (int i = 0; i < threads; ++i) host::require_close("total", total[i], 36000 + 9 * i, 0);
    host::require(counter[0] == 0, "the counter is 0 after a launch");
  }
}

// Sums over a warp, in every type that is shuffled.
template <typename T>
void warp_sum(T* out) {
  T value = static_cast<T>(port::thread_index());
  for (int mask = 1; mask < 32; mask *= 2) value += port::shuffle_xor(value, mask);
  out[port::thread_index()] = value;
}

template <typename T>
void run_warp_sum(const host::Schedule& schedule) {
  host::Buffer<T> out("out", 96, host::Use::kOutput);
  host::launch({1}, 96, 0, schedule, [&] { warp_sum(out.data()); });
  for (int i = 0; i < 96; ++i) host::require(out[i] == static_cast<T>(496 + i / 32 * 1024), "sum over the warp");
}

// Vectors, with a tail: what is read and written is counted to the byte.
struct alignas(16) Four {
  float value[4];
};

struct CopyArgs {
  const float* x;  // [count]
  float* out;      // [count + slack]
  int count;
  int slack;  // wrong: how far the kernel goes beyond the end
};

GC_KERNEL(32, 1) copy(const CopyArgs args) {
  const int begin = (port::block_x() * port::block_threads() + port::thread_index()) * 4;
  const int end = args.count + args.slack;
  if (begin + 4 <= end) {
    port::store_streaming(reinterpret_cast<Four*>(args.out + begin),
                          port::load_global(reinterpret_cast<const Four*>(args.x + begin)));
  } else {
    for (int i = begin; i < end; ++i) args.out[i] = args.x[i];
  }
}

void run_copy(const host::Schedule& schedule, int slack, int misaligned) {
  const int count = 203;
  host::Buffer<float> x("x", count, host::Use::kInput, misaligned);
  host::Buffer<float> out("out", count, host::Use::kOutput, misaligned);
  std::iota(x.data(), x.data() + count, 1.0f);
  host::launch({2, 1, 1}, 32, 0, schedule, [&] { copy({x.data(), out.data(), count, slack}); });
  for (int i = 0; i < count; ++i) host::require_close("copy", out[i], i + 1, 0);
  if (host::kRaceBuild) host::require(x.traffic().read == 812 && out.traffic().written == 812, "812 bytes each way");
}

// A launch that begins early: what it does before it waits for the launch before.
enum class Before { kNothing, kPlainRead, kRead, kWrite, kTicket, kIdleBlock, kPrefetchPast };

struct EarlyArgs {
  const float* x;     // [threads]
  float* out;         // [threads]
  unsigned* counter;  // 0
  Before before;      // all but kNothing are wrong
};

GC_KERNEL(32, 1) early(const EarlyArgs args) {
  port::let_next_launch_begin();
  port::SharedArena arena;
  float* const values = arena.take<float>(port::block_threads());
  const int i = port::block_x() * port::block_threads() + port::thread_index();
  values[port::thread_index()] = 2;
  float sum = values[port::thread_index()];
  port::prefetch_line(args.x + i);
  if (args.before == Before::kPlainRead) sum += args.x[i];
  if (args.before == Before::kRead) sum += port::load_global(args.x + i);
  if (args.before == Before::kWrite) port::store_streaming(args.out + i, sum);
  if (args.before == Before::kTicket) port::take_ticket(args.counter);
  if (args.before == Before::kIdleBlock && port::block_x() == 1) return;
  if (args.before == Before::kPrefetchPast) port::prefetch_line(args.x + i + 64);
  port::wait_for_launch_before<kWait>();
  args.out[i] = sum + port::load_global(args.x + i);
}

void run_early(const host::Schedule& schedule, Before before, bool begins_early = true) {
  const int blocks = 2, threads = 32;
  host::Buffer<float> x("x", std::vector<float>(blocks * threads, 3), host::Use::kInput);
  host::Buffer<float> out("out", blocks * threads, host::Use::kOutput);
  host::Buffer<unsigned> counter("counter", std::vector<unsigned>{0}, host::Use::kState);
  const auto report = host::launch(
      {blocks}, threads, threads * 4, schedule, [&] { early({x.data(), out.data(), counter.data(), before}); },
      host::kSharedLimit, begins_early);
  host::require(report.early == begins_early && report.lets_next_begin, "what is reported of the launch");
  if (host::kRaceBuild) host::require(x.traffic().prefetched == blocks * threads, "prefetches are counted");
  if (before == Before::kNothing) host::require_close("out", out[threads], 5, 0);
}

// out[i] = x[i] + x[i ^ 1], twice, x by copies that each thread starts and both threads of a pair read.
struct StagedArgs {
  const float* x;  // [2, threads, 4]
  float* out;      // like x
  bool early;      // wrong: reads its own copy before it has awaited it
};

GC_KERNEL(64, 1) staged(const StagedArgs args) {
  port::SharedArena arena;
  const int threads = port::block_threads(), thread = port::thread_index();
  Four* const places = arena.take<Four>(threads);
  for (int round = 0; round < 2; ++round) {
    port::stage<16>(places + thread, args.x + (round * threads + thread) * 4);
    const Four early = args.early ? places[thread] : Four{};
    port::await_staged<kAwait>();
    port::sync_block<kStagedByAll>();
    for (int i = 0; i < 4; ++i) {
      const float own = args.early ? early.value[i] : places[thread].value[i];
      args.out[(round * threads + thread) * 4 + i] = own + places[thread ^ 1].value[i];
    }
    port::sync_block<kRefill>();
  }
}

void run_staged(const host::Schedule& schedule, bool early) {
  const int threads = 64;
  host::Buffer<float> x("x", 2 * threads * 4, host::Use::kInput);
  host::Buffer<float> out("out", 2 * threads * 4, host::Use::kOutput);
  std::iota(x.data(), x.data() + x.size(), 1.0f);
  host::launch({1}, threads, threads * 16, schedule, [&] { staged({x.data(), out.data(), early}); });
  for (std::size_t i = 0; i < x.size(); ++i) host::require_close("sum", out[i], x[i] + x[i ^ 4], 0);
  if (host::kRaceBuild) host::require(x.traffic().read == x.bytes(), "a copy reads its source once");
}

// Kernels with a bug each.

GC_KERNEL(32, 1) never_awaited(float* x) {
  port::SharedArena arena;
  port::stage<4>(arena.take<float>(32) + port::thread_index(), x + port::thread_index());
}

GC_KERNEL(32, 1) staged_off_its_boundary(float* x) {
  port::SharedArena arena;
  port::stage<8>(arena.take<float>(64) + 2 * port::thread_index(), x + port::thread_index());
  port::await_staged<kAwait>();
}

GC_KERNEL(64, 1) divergent(float* out) {
  port::thread_index() < 32 ? port::sync_block<0>() : port::sync_block<1>();
  out[port::thread_index()] = 0;
}

GC_KERNEL(64, 1) early_exit(float* out) {
  if (port::thread_index() == 40) return;
  port::sync_block<0>();
  out[port::thread_index()] = 0;
}

GC_KERNEL(32, 1) half_a_warp(float* out) {
  float value = 1;
  if (port::thread_index() < 16) value = port::shuffle_xor(value, 1);
  port::sync_block<0>();
  out[port::thread_index()] = value;
}

// The block's neighbour is read in the same launch, with no order between the two.
GC_KERNEL(32, 1) in_place_shift(float* x) {
  const int i = port::block_x() * port::block_threads() + port::thread_index();
  x[i] = x[(i + 32) % (port::grid_x() * port::block_threads())];
}

GC_KERNEL(32, 1) shared_overrun(float* out, int count) {
  port::SharedArena arena;
  float* const a = arena.take<float>(32);
  float* const b = arena.take<float>(32);
  b[port::thread_index()] = 1;
  a[port::thread_index() + count - 32] = 2;
  out[port::thread_index()] = b[port::thread_index()];
}

GC_KERNEL(32, 1) two_arenas(float* out) {
  port::SharedArena first, second;
  out[port::thread_index()] = first.take<float>(1) == second.take<float>(1);
}

GC_KERNEL(32, 1) shuffle_as_barrier(float* out) {
  port::SharedArena arena;
  float* const values = arena.take<float>(32);
  values[port::thread_index()] = 1;
  port::shuffle_xor(0, 1);
  out[port::thread_index()] = values[port::thread_index() ^ 1];
}

GC_KERNEL(32, 1) read_of_output(float* out) { out[port::thread_index()] += 1; }
GC_KERNEL(32, 1) store(float* out) { out[port::thread_index()] = 1; }

template <typename Kernel>
host::Case bad(const std::string& name, const std::string& reason, int threads, const Kernel& kernel,
               host::Use use = host::Use::kOutput, int shared_bytes = 256, host::Grid grid = {1, 1, 1}) {
  return {"bad_" + name, reason, [=](const host::Schedule& schedule) {
            host::Buffer<float> out("out", 2 * threads, use);
            host::launch(grid, threads, shared_bytes, schedule, [&] { kernel(out.data()); });
          }};
}

}  // namespace

int main(int argc, char** argv) {
  using host::Schedule;
  return host::run_cases(
      argc, argv,
      {
          {"block_sum", "two barriers around shared memory", run_block_sum},
          {"last_block_one_fence", "one thread fences for its block",
           [](const Schedule& s) { run_last_block(s, false); }},
          {"last_block_all_fence", "each thread fences for itself", [](const Schedule& s) { run_last_block(s, true); }},
          {"shuffle_float", "4 bytes", run_warp_sum<float>},
          {"shuffle_double", "8 bytes", run_warp_sum<double>},
          {"shuffle_int", "an integer", run_warp_sum<int>},
          {"copy", "vectors and a tail", [](const Schedule& s) { run_copy(s, 0, 0); }},
          {"early", "nothing but shared memory and prefetches before the wait",
           [](const Schedule& s) { run_early(s, Before::kNothing); }},
          {"not_early", "a launch that waits for nobody, and so may do anything",
           [](const Schedule& s) { run_early(s, Before::kWrite, false); }},
          {"bad_early_plain_read", "a read before the wait",
           [](const Schedule& s) { run_early(s, Before::kPlainRead); }},
          {"bad_early_load", "a vector read before it", [](const Schedule& s) { run_early(s, Before::kRead); }},
          {"bad_early_write", "a write before it", [](const Schedule& s) { run_early(s, Before::kWrite); }},
          {"bad_early_ticket", "a ticket before it", [](const Schedule& s) { run_early(s, Before::kTicket); }},
          {"bad_early_idle", "an idle block without it", [](const Schedule& s) { run_early(s, Before::kIdleBlock); }},
          {"bad_prefetch", "of what is no buffer", [](const Schedule& s) { run_early(s, Before::kPrefetchPast); }},
          {"staged", "copies to shared memory that others read, and places that are filled again",
           [](const Schedule& s) { run_staged(s, false); }},
          {"bad_early_read", "a copy is read before it is awaited", [](const Schedule& s) { run_staged(s, true); }},
          {"bad_overrun", "4 bytes past the end", [](const Schedule& s) { run_copy(s, 1, 0); }},
          {"bad_alignment", "a vector off its boundary", [](const Schedule& s) { run_copy(s, 0, 1); }},
          bad("divergent", "two barriers, half the block at each", 64, divergent),
          bad("early_exit", "a thread leaves before the barrier", 64, early_exit),
          bad("half_a_warp", "half a warp shuffles, the other half is at a barrier", 32, half_a_warp),
          bad("partial_warp", "a warp of 16 threads shuffles", 16, [](float* out) { warp_sum(out); }),
          bad("in_place_shift", "two blocks touch the same bytes", 32, in_place_shift, host::Use::kState, 0, {2, 1, 1}),
          bad("shared_overrun", "past the first of two arrays", 32, [](float* out) { shared_overrun(out, 33); }),
          bad(
              "shared_size", "more shared memory than launched with", 32, [](float* out) { shared_overrun(out, 32); },
              host::Use::kOutput, 240),
          bad("two_arenas", "a second arena starts at the first byte again", 32, two_arenas),
          bad("shuffle_as_barrier", "a shuffle does not order memory", 32, shuffle_as_barrier),
          bad("read_of_output", "an output is read before it is written", 32, read_of_output),
          bad("never_awaited", "a thread ends before its copy is there", 32, never_awaited, host::Use::kInput),
          bad("staged_off_its_boundary", "8 bytes from a multiple of 4", 32, staged_off_its_boundary,
              host::Use::kInput),
          bad("input_written", "an input is written", 32, store, host::Use::kInput),
          bad("block_of_2048", "a block of too many threads", 2048, store),
          bad("shared_64k", "more shared memory than a GPU gives unasked", 32, store, host::Use::kOutput, 64 * 1024),
          bad("grid_y", "too many blocks in y", 32, store, host::Use::kOutput, 0, {1, 65536, 1}),
      });
}
