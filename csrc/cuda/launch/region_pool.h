// Regions of device memory that are zero whenever no launch uses them: counters by which blocks meet, and whatever else
// a kernel leaves as it found it. They are filled once, when they are made, and never by a launch or a graph.
//
// Two launches may share a region if one runs after the other. Who may have one:
//
//   a stream that has an id which no other stream of the process ever gets: one region for all of its launches, for the
//     work of a stream is done in order. The first kMostStreams streams have theirs for as long as the process lives.
//   any other stream: a loan for one launch. The region comes back with a mark, a point in the stream's work, and is
//     lent again once that point has passed.
//   a launch captured into a graph: a slice of its own. Branches of a graph may run at the same time, and their order
//     is not known while they are captured; slices that nobody shares are right in any order. A graph holds the regions
//     of its slices, and every executable graph made from it does so too; they come back when the last of these is
//     gone and its work is done, so they are zero then. (Two executables of one graph that run at the same time would
//     share slices. They would share the captured outputs too, which makes it an error anyway.)
//
// This file knows neither CUDA nor torch: both are behind Memory, which tests/host replaces.
//
//   void* Memory::zeroed(int device, int64_t bytes)    new memory, already zero for whoever uses it next; may throw
//   Memory::Mark                                       a point in a stream's work; movable
//   bool Memory::passed(const Mark&)                   whether that work is done; must not wait
//
// A graph's regions come back on a thread of the CUDA runtime, which other calls of the runtime may wait for. So the
// lock is never held over a call of Memory or of a function that was passed in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace gc {

// Regions have this size or, where more is asked for, this times a power of two.
inline constexpr int64_t kRegionBytes = 4096;
// As many of the smallest are made at once.
inline constexpr int64_t kRegionsAtOnce = 256;
// A slice begins on a cache line of its own.
inline constexpr int64_t kSliceBytes = 128;
// Streams with a region of their own, all devices together. PyTorch has 32 for each priority of a device; a program
// that goes on creating streams would otherwise need more memory with each.
inline constexpr size_t kMostStreams = 2048;

struct Region {
  void* start;
  int64_t bytes;
  int device;
  uint64_t capture;  // what it was last lent to, if that was a graph
};

template <typename Memory>
class RegionPool {
 public:
  using Mark = typename Memory::Mark;

  // A region on loan. The mark is that of its last loan, whose resources the next mark may reuse.
  struct Loan {
    Region* region;
    Mark mark;
  };

  explicit RegionPool(Memory memory = {}) : memory_(std::move(memory)) {}
  RegionPool(const RegionPool&) = delete;
  RegionPool& operator=(const RegionPool&) = delete;

  // For launches on a stream with an id that is unique in the process; nullptr if too many streams have a region.
  void* of_stream(int device, uint64_t stream, int64_t bytes) {
    const std::pair<int, uint64_t> key(device, stream);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto at = streams_.find(key);
      if (at != streams_.end() && at->second->bytes >= bytes) return at->second->start;
      if (at == streams_.end() && streams_.size() >= kMostStreams) return nullptr;
    }
    Region* const larger = take(device, bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    Region*& own = streams_[key];
    if (own != nullptr && own->bytes >= bytes) {  // another thread was faster
      put_back(larger);
    } else {
      // One that has become too small stays out of the pool: launches that use it may be still to run. All that a
      // stream leaves behind in this way is together smaller than what it has.
      own = larger;
    }
    return own->start;
  }

  // For one launch.
  Loan borrow(int device, int64_t bytes) {
    const Class size(device, rounded(bytes));
    std::optional<Loan> oldest;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::deque<Loan>& lent = lent_[size];
      if (!lent.empty()) {
        oldest = std::move(lent.front());
        lent.pop_front();
      }
    }
    if (oldest.has_value()) {
      if (memory_.passed(oldest->mark)) return std::move(*oldest);
      const std::lock_guard<std::mutex> lock(mutex_);
      lent_[size].push_front(std::move(*oldest));
    }
    return {take(device, bytes), Mark{}};
  }

  // loan.mark: the end of the launch that borrowed the region.
  void give_back(Loan loan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lent_[Class(loan.region->device, loan.region->bytes)].push_back(std::move(loan));
  }

  // For one launch that is captured; `capture` is unique in the process. retain(region), called for each new region,
  // must not throw. It makes the graph release(region) when nothing of it is left; if it cannot, it gives false, has
  // released the region or will, and the result is nullptr.
  template <typename Retain>
  void* of_capture(int device, uint64_t capture, int64_t bytes, const Retain& retain) {
    const std::pair<int, uint64_t> key(device, capture);
    const int64_t wanted = (bytes + kSliceBytes - 1) / kSliceBytes * kSliceBytes;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto at = captures_.find(key);
      if (at != captures_.end() && at->second.region->bytes - at->second.used >= wanted) {
        void* const slice = static_cast<char*>(at->second.region->start) + at->second.used;
        at->second.used += wanted;
        return slice;
      }
    }
    Region* const region = take(device, wanted);
    region->capture = capture;  // before retain: whoever releases it reads this
    if (!retain(region)) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    captures_[key] = {region, wanted};
    return region->start;
  }

  // A graph is gone, and its work is done. Only locks and lists: the thread that calls this must not wait for CUDA.
  void release(Region* region) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = captures_.find({region->device, region->capture});
    if (at != captures_.end() && at->second.region == region) captures_.erase(at);
    put_back(region);
  }

 private:
  using Class = std::pair<int, int64_t>;  // device, bytes
  struct Slices {
    Region* region;
    int64_t used;
  };

  static int64_t rounded(int64_t bytes) {
    int64_t size = kRegionBytes;
    while (size < bytes) size *= 2;
    return size;
  }

  // With the lock held.
  void put_back(Region* region) { free_[Class(region->device, region->bytes)].push_back(region); }

  // A region that is zero and nobody's.
  Region* take(int device, int64_t bytes) {
    const Class size(device, rounded(bytes));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::vector<Region*>& free = free_[size];
      if (!free.empty()) {
        Region* const region = free.back();
        free.pop_back();
        return region;
      }
    }
    const int64_t count = size.second == kRegionBytes ? kRegionsAtOnce : 1;
    char* const start = static_cast<char*>(memory_.zeroed(device, count * size.second));
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = count - 1; i > 0; --i) put_back(add({start + i * size.second, size.second, device, 0}));
    return add({start, size.second, device, 0});
  }

  // With the lock held.
  Region* add(const Region& region) {
    regions_.push_back(region);
    return &regions_.back();
  }

  Memory memory_;
  std::mutex mutex_;            // of all that follows
  std::deque<Region> regions_;  // all that there are; their addresses stay
  std::map<Class, std::vector<Region*>> free_;
  std::map<std::pair<int, uint64_t>, Region*> streams_;
  std::map<Class, std::deque<Loan>> lent_;               // those that came back, oldest first
  std::map<std::pair<int, uint64_t>, Slices> captures_;  // what the next slice is cut from
};

}  // namespace gc
