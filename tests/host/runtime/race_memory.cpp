#include "race_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace gc::host::race {
namespace {

// Between allocations: no access can step over it unseen.
constexpr std::size_t kGap = 256;

void* reserve(std::size_t bytes) {
  void* const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    std::perror("no addresses for the race checker");
    std::abort();
  }
  return pages;
}

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

ShadowedMemory::ShadowedMemory()
    : base_(static_cast<char*>(reserve(kBytes))),
      cells_(static_cast<Cell*>(reserve(kBytes / kGranule * sizeof(Cell)))),
      regions_(1),
      more_reads_(1) {}

void* ShadowedMemory::allocate(const std::string& name, std::size_t bytes, std::size_t offset, Use use) {
  // Allocations come and go like a stack, but for a few; what was freed at the end is taken again.
  const std::size_t begin = used_ + kGap;
  used_ = round_up(begin + offset + bytes, 16);
  if (used_ + kGap > static_cast<std::size_t>(kBytes)) throw std::bad_alloc();

  std::uint32_t index = 0;
  if (free_regions_.empty()) {
    index = static_cast<std::uint32_t>(regions_.size());
    regions_.emplace_back();
  } else {
    index = free_regions_.back();
    free_regions_.pop_back();
  }
  regions_[index] = Region{name, base_ + begin, base_ + begin + offset, bytes, use, {}};
  Cell fresh;
  fresh.region = index;
  Cell* const first = &cell(base_ + begin + offset);
  std::fill(first, first + (bytes + kGranule - 1) / kGranule, fresh);
  return base_ + begin;
}

void ShadowedMemory::release(void* base) {
  const auto found =
      std::find_if(regions_.begin() + 1, regions_.end(), [&](const Region& region) { return region.base == base; });
  Cell* const first = &cell(found->begin);
  std::fill(first, first + (found->bytes + kGranule - 1) / kGranule, Cell{});
  *found = Region{};
  free_regions_.push_back(static_cast<std::uint32_t>(found - regions_.begin()));

  used_ = 0;
  for (const Region& region : regions_) {
    if (region.begin != nullptr) used_ = std::max(used_, round_up(region.begin + region.bytes - base_, 16));
  }
}

std::vector<Stamp>& ShadowedMemory::more_reads(Cell& cell) {
  if (cell.more_reads == 0) {
    cell.more_reads = static_cast<std::uint32_t>(more_reads_.size());
    more_reads_.emplace_back();
    cells_with_more_reads_.push_back(&cell);
  }
  return more_reads_[cell.more_reads];
}

void ShadowedMemory::forget_reads() {
  for (Cell* const cell : cells_with_more_reads_) cell->more_reads = 0;
  cells_with_more_reads_.clear();
  more_reads_.resize(1);
}

std::string ShadowedMemory::describe(const void* address) {
  const char* const byte = static_cast<const char*>(address);
  const Region* below = nullptr;
  for (const Region& region : regions_) {
    if (region.begin == nullptr || region.begin > byte) continue;
    if (below == nullptr || region.begin > below->begin) below = &region;
  }
  if (below == nullptr) return "memory before any allocation";
  const std::size_t at = byte - below->begin;
  return below->name + ", byte " + std::to_string(at) + " of " + std::to_string(below->bytes);
}

}  // namespace gc::host::race
