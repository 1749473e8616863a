#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <time.h>
#endif

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace gc::cpu {

namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

constexpr int64_t kLargeBytes = 4 * 1024 * 1024;  // from two huge pages on
constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
constexpr int64_t kPagesPerThread = 4;  // at least: touching as many that are there already takes a microsecond
constexpr int64_t kSlowNanoseconds = 1'000'000;  // what small pages in place of a huge one take

// Of this thread on a processor: waiting for one is not the page's fault.
int64_t thread_nanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

// Only for huge pages that lie wholly in the block: its neighbours keep theirs.
void ask_for_huge_pages(void* data, int64_t bytes) {
  if (bytes < kLargeBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage;
  std::atomic<bool> enough{false};
  // Threads share the pages as they will share the writing, so that each page lies in memory near its thread.
  at::parallel_for(0, static_cast<int64_t>(end - begin), kPagesPerThread, [&](int64_t first, int64_t last) {
    int64_t before = thread_nanoseconds();
    for (int64_t i = first; i < last && !enough.load(std::memory_order_relaxed); ++i) {
      void* const page = reinterpret_cast<void*>((begin + static_cast<uintptr_t>(i)) * kHugePage);
      const bool refused = madvise(page, kHugePage, MADV_HUGEPAGE) != 0;
      if (!refused) *static_cast<volatile char*>(page) = 0;
      const int64_t now = thread_nanoseconds();
      if (refused || now - before > kSlowNanoseconds) enough.store(true, std::memory_order_relaxed);
      before = now;
    }
  });
}

#else

void ask_for_huge_pages(void*, int64_t) {}

#endif

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Tensor out = at::empty(sizes, options);
  ask_for_huge_pages(out.data_ptr(), static_cast<int64_t>(out.nbytes()));
  return out;
}

}  // namespace gc::cpu
