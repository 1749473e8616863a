// The race build's memory: one reserved range of addresses, and for every two bytes of it a cell that says who touched
// them last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "knowledge.h"
#include "memory.h"

namespace gc::host::race {

inline constexpr std::size_t kGranule = 2;  // the smallest element

struct Cell {
  Stamp write;
  Stamp read;                    // the last one; those of other blocks that it does not cover are in more_reads
  std::uint32_t more_reads = 0;  // index into ShadowedMemory's, or 0
  std::uint32_t region = 0;      // index into ShadowedMemory's, or 0: not allocated
  bool counter = false;          // tickets have been taken from it
  bool in_flight = false;        // a copy to it has begun, and nobody has awaited it
};

struct Region {
  std::string name;
  char* base = nullptr;   // of the allocation
  char* begin = nullptr;  // of the bytes that may be touched
  std::size_t bytes = 0;
  Use use = Use::kInput;
  Traffic traffic;
};

class ShadowedMemory {
 public:
  ShadowedMemory();

  void* allocate(const std::string& name, std::size_t bytes, std::size_t offset, Use use);
  void release(void* base);

  bool contains(const void* address) const {
    return static_cast<const char*>(address) - base_ < kBytes && address >= base_;
  }
  Cell& cell(const void* address) const { return cells_[(static_cast<const char*>(address) - base_) / kGranule]; }
  Region& region(const Cell& cell) { return regions_[cell.region]; }

  // The reads of a cell beside `Cell::read`, of this launch only.
  std::vector<Stamp>& more_reads(Cell& cell);
  void forget_reads();

  // "partial, byte 16 of 64", or where the nearest allocation below ends.
  std::string describe(const void* address);

 private:
  static constexpr std::ptrdiff_t kBytes = std::ptrdiff_t{1} << 27;

  char* base_;
  Cell* cells_;
  std::size_t used_ = 0;
  std::vector<Region> regions_;
  std::vector<std::uint32_t> free_regions_;
  std::vector<std::vector<Stamp>> more_reads_;
  std::vector<Cell*> cells_with_more_reads_;
};

}  // namespace gc::host::race
