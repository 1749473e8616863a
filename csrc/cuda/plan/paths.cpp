#include "cuda/plan/paths.h"

#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace gc {

namespace {

constexpr const char* kNames[] = {"staged_grad",  "tiles_ahead", "late_merge", "early_start",
                                  "full_machine", "neighbours",  "tail",       "around"};
static_assert(sizeof(kNames) / sizeof(*kNames) == kPathCount, "every path has a name");

constexpr Path path_at(int i) { return static_cast<Path>(1u << i); }

constexpr int64_t kNothingChosen = -1;

int64_t chosen_at_first() {
  const char* const list = std::getenv("GC_CUDA_PATHS");
  if (list == nullptr || *list == '\0') return kNothingChosen;
  try {
    return paths_named(list).bits;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("GC_CUDA_PATHS: ") + error.what());
  }
}

std::atomic<int64_t>& chosen() {
  static std::atomic<int64_t> bits{chosen_at_first()};
  return bits;
}

}  // namespace

std::string names_of(Paths paths) {
  std::string names;
  for (int i = 0; i < kPathCount; ++i) {
    if (paths.has(path_at(i))) names += std::string(names.empty() ? "" : ",") + kNames[i];
  }
  return names.empty() ? "none" : names;
}

Paths paths_named(const std::string& list) {
  Paths all;
  for (int i = 0; i < kPathCount; ++i) all = all | path_at(i);
  if (list == "all") return all;
  if (list == "none" || list.empty()) return {};
  Paths paths;
  std::istringstream words(list);
  for (std::string word; std::getline(words, word, ',');) {
    const Paths before = paths;
    bool known = false;
    for (int i = 0; i < kPathCount; ++i) {
      if (word == kNames[i]) {
        paths = before | path_at(i);
        known = true;
      }
    }
    if (!known) {
      throw std::invalid_argument("paths must be all, none, or some of " + names_of(all) +
                                  " with commas between, got " + list);
    }
  }
  return paths;
}

Paths default_paths(int /*compute_capability*/) { return {}; }  // none has been measured yet

Paths paths_on(int compute_capability) {
  const Paths wanted = chosen_paths().value_or(default_paths(compute_capability));
  Paths missing;
  if (compute_capability < 90) missing = missing | Path::kEarlyStart;
  if (compute_capability < 80) missing = missing | Path::kStagedGrad | Path::kTilesAhead;  // no copies to shared memory
  return wanted.without(missing);
}

void choose_paths(std::optional<Paths> paths) { chosen() = paths ? int64_t{paths->bits} : kNothingChosen; }

std::optional<Paths> chosen_paths() {
  const int64_t bits = chosen();
  if (bits == kNothingChosen) return std::nullopt;
  Paths paths;
  paths.bits = static_cast<unsigned>(bits);
  return paths;
}

}  // namespace gc
