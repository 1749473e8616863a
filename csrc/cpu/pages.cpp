#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <time.h>
#endif

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace gc::cpu {

namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

constexpr int64_t kLargeBytes = 4 * 1024 * 1024;  // from two huge pages on
constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
constexpr int64_t kPagesPerThread = 8;           // at least; clearing them takes 700 us
constexpr int64_t kThereNanoseconds = 20'000;    // a page that was there already takes less, a new one more
constexpr int64_t kSlowNanoseconds = 1'000'000;  // what small pages in place of a huge one take

// The time that this thread has spent on a processor: waiting for one is not the page's fault.
int64_t thread_nanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

// The huge pages that lie wholly in an allocation: its neighbours keep theirs.
class HugePages {
 public:
  HugePages(const void* data, int64_t bytes)
      : begin_((reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage),
        count_(static_cast<int64_t>((reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage -
                                    begin_)) {}

  void ask() {
    const int64_t next = ask(0, count_, kThereNanoseconds);
    // Threads share new pages as they will share the writing, so that each page lies in memory near its thread.
    at::parallel_for(next, count_, kPagesPerThread,
                     [this](int64_t first, int64_t last) { ask(first, last, kSlowNanoseconds); });
  }

 private:
  // Asks up to the first page that takes longer than `patience`, and returns the one after it. Once a page was slow,
  // nobody asks for more.
  int64_t ask(int64_t first, int64_t last, int64_t patience) {
    int64_t before = thread_nanoseconds();
    for (int64_t i = first; i < last; ++i) {
      if (enough_.load(std::memory_order_relaxed)) return last;
      void* const page = reinterpret_cast<void*>((begin_ + static_cast<uintptr_t>(i)) * kHugePage);
      const bool refused = madvise(page, kHugePage, MADV_HUGEPAGE) != 0;
      if (!refused) *static_cast<volatile char*>(page) = 0;
      const int64_t now = thread_nanoseconds();
      if (refused || now - before > kSlowNanoseconds) {
        enough_.store(true, std::memory_order_relaxed);
        return last;
      }
      if (now - before > patience) return i + 1;
      before = now;
    }
    return last;
  }

  uintptr_t begin_;
  int64_t count_;
  std::atomic<bool> enough_{false};
};

void ask_for_huge_pages(const void* data, int64_t bytes) {
  if (bytes >= kLargeBytes) HugePages(data, bytes).ask();
}

#else

void ask_for_huge_pages(const void*, int64_t) {}

#endif

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out(at::detail::empty_cpu(sizes, options));
  ask_for_huge_pages(out.data_ptr(), static_cast<int64_t>(out.nbytes()));
  return out;
}

}  // namespace gc::cpu
