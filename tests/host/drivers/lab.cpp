// The laboratory's kernels (bench/lab) on the CPU: those that need nothing but cells, counters, barriers and copies,
// which the harness does at once. Bulk copies, clusters, hints and programmatic launches have no counterpart here.
//
// Kernels whose blocks wait for each other run with as many blocks as the harness has in flight, so only under the
// schedules that have several.
#include "../../../bench/lab/copy_kernels.h"
#include "../../../bench/lab/expected.h"
#include "../../../bench/lab/fill_kernels.h"
#include "../../../bench/lab/meet_kernels.h"
#include "cases.h"

namespace {

using namespace gc;
using namespace gc::lab;

constexpr int kSharedLimit = 227 * 1024;  // of an H100

bool many_in_flight(const host::Schedule& schedule) {
  return schedule.order == host::Order::kRandom || schedule.order == host::Order::kStarvation;
}

std::vector<unsigned> random_words(std::size_t count) {
  std::vector<unsigned> words(count);
  for (std::size_t i = 0; i < count; ++i) words[i] = random_word(static_cast<unsigned>(i) + 17);
  return words;
}

std::vector<unsigned> pattern_words(std::size_t count) {
  std::vector<unsigned> words(count);
  for (std::size_t i = 0; i < count; ++i) words[i] = pattern_word(static_cast<unsigned>(i / 4), i % 4);
  return words;
}

Vec16* vectors(host::Buffer<unsigned>& words) { return reinterpret_cast<Vec16*>(words.data()); }

void require_equal(const host::Buffer<unsigned>& found, const std::vector<unsigned>& wanted, const std::string& what) {
  host::require(found.size() == wanted.size(), what + ": sizes");
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    host::require(found[i] == wanted[i], what + ": word " + std::to_string(i) + " differs");
  }
}

void run_copy(const host::Schedule& schedule) {
  const int count = 2 * kCopyThreads * kCopyBatch + 77;
  const std::vector<unsigned> words = random_words(count * 4);
  host::Buffer<unsigned> in("in", words, host::Use::kInput), out("out", words.size(), host::Use::kOutput);
  host::launch({3}, kCopyThreads, 0, schedule, [&] { copy_vectors({vectors(in), vectors(out), nullptr, count}); });
  require_equal(out, words, "copy");
  if (host::kRaceBuild) host::require(in.traffic().read == in.bytes(), "the copy reads every byte once");
}

void run_sum(const host::Schedule& schedule) {
  const int count = 1000, blocks = 2, threads = 32;
  const std::vector<unsigned> words = random_words(count * 4);
  host::Buffer<unsigned> in("in", words, host::Use::kInput), sums("sums", blocks * threads, host::Use::kOutput);
  host::launch({blocks}, threads, 0, schedule, [&] { sum_words({vectors(in), sums.data(), nullptr, count}); });
  unsigned sum = 0;
  for (int i = 0; i < blocks * threads; ++i) sum += sums[i];
  host::require(sum == expected_sum(words), "the weighted sum");
  // A word in the wrong place is noticed.
  std::vector<unsigned> swapped = words;
  std::swap(swapped[5], swapped[2005]);
  host::require(expected_sum(swapped) != expected_sum(words), "the weighted sum does not see an exchange of words");
}

void run_write(const host::Schedule& schedule) {
  const int count = kCopyThreads * kCopyBatch + 3;
  host::Buffer<unsigned> out("out", count * 4, host::Use::kOutput);
  host::launch({2}, kCopyThreads, 0, schedule, [&] { write_random({vectors(out), nullptr, count}); });
  require_equal(out, pattern_words(count * 4), "write");
}

// Blocks in groups of `group`, the last of which may be smaller.
template <Meet Way>
void run_exchange(const host::Schedule& schedule, int blocks, int group, int count) {
  if (!many_in_flight(schedule)) return;
  const int groups = (blocks + group - 1) / group, threads = 32, rounds = 5;
  host::Buffer<Cell> cells("cells", std::vector<Cell>(2 * groups * count), host::Use::kState);
  host::Buffer<unsigned> words("words", 2 * groups * count, host::Use::kOutput);
  host::Buffer<unsigned> counter("counter", std::vector<unsigned>(groups * 32), host::Use::kState);
  host::Buffer<unsigned> flags("flags", std::vector<unsigned>(blocks), host::Use::kState);
  host::Buffer<unsigned> out("out", blocks * count, host::Use::kOutput);
  host::Buffer<unsigned> failed("failed", std::vector<unsigned>(1), host::Use::kState);
  const int shared = 2 * kMaxCells * 4;
  host::launch({blocks}, threads, shared, schedule, [&] {
    exchange<Way>({cells.data(), words.data(), counter.data(), flags.data(), out.data(), failed.data(), nullptr, group,
                   count, rounds});
  });
  host::require(failed[0] == 0, "a wait gave up");
  require_equal(out, expected_exchange(blocks, group, count, rounds), "values after the last round");
}

void run_scatter(const host::Schedule& schedule, int blocks, int count) {
  if (!many_in_flight(schedule)) return;
  const int threads = 32, rounds = 4;
  host::Buffer<Cell> cells("cells", std::vector<Cell>(2 * blocks * count), host::Use::kState);
  host::Buffer<unsigned> out("out", blocks, host::Use::kOutput);
  host::Buffer<unsigned> failed("failed", std::vector<unsigned>(1), host::Use::kState);
  host::launch({blocks}, threads, kMeetThreads * 4 + 16, schedule,
               [&] { scatter_cells({cells.data(), out.data(), failed.data(), nullptr, count, rounds}); });
  require_equal(out, expected_scatter(blocks, count, rounds), "states after the last round");
}

template <Fill Way>
void run_fill(const host::Schedule& schedule, int rows, int row_bytes) {
  const int blocks = 3, threads = 64;
  const std::vector<unsigned> words = random_words(rows * blocks * row_bytes / 4);
  host::Buffer<unsigned> in("in", words, host::Use::kInput), out("out", words.size(), host::Use::kOutput);
  host::Buffer<unsigned> failed("failed", std::vector<unsigned>(1), host::Use::kState);
  FillArgs args{};
  args.in = reinterpret_cast<const unsigned char*>(in.data());
  args.out = reinterpret_cast<unsigned char*>(out.data());
  args.failed = failed.data();
  args.rows = rows;
  args.row_bytes = row_bytes;
  args.row_shift = 30;
  for (int shift = 0; rows > 1 && shift < 30; ++shift) {
    if (1 << shift == row_bytes) args.row_shift = shift;
  }
  host::launch({blocks}, threads, (rows * row_bytes + 15) / 16 * 16 + 16, schedule, [&] { fill_shared<Way>(args); });
  require_equal(out, words, "fill");
}

template <Sink To>
void run_stream(const host::Schedule& schedule, int blocks, int tiles) {
  const std::vector<unsigned> words = random_words(static_cast<std::size_t>(tiles) * kTileVectors * 4);
  host::Buffer<unsigned> in("in", words, host::Use::kInput), out("out", words.size(), host::Use::kOutput);
  host::Buffer<unsigned> sums("sums", blocks * kStreamThreads, host::Use::kOutput);
  host::Buffer<unsigned> failed("failed", std::vector<unsigned>(1), host::Use::kState);
  host::launch(
      {blocks}, kStreamThreads, kSlots * kTileBytes + 112, schedule,
      [&] { stream_tiles<false, To>({vectors(in), vectors(out), sums.data(), failed.data(), tiles}); }, kSharedLimit);
  if (To == Sink::kWrite) return require_equal(out, words, "stream");
  unsigned sum = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) sum += sums[i];
  host::require(sum == expected_sum(words), "the weighted sum of a stream");
}

void run_phases(const host::Schedule& schedule, int blocks, int slabs, bool read) {
  if (!many_in_flight(schedule)) return;
  const std::size_t count = static_cast<std::size_t>(slabs) * blocks * kSlots * kTileVectors * 4;
  std::vector<unsigned> words = pattern_words(count);
  if (!read) {
    for (std::size_t i = 0; i < count; ++i) words[i] = words[i % (count / slabs)];
  }
  host::Buffer<unsigned> in("in", words, host::Use::kInput), out("out", count, host::Use::kOutput);
  host::Buffer<unsigned> counter("counter", std::vector<unsigned>(1), host::Use::kState);
  host::Buffer<unsigned> failed("failed", std::vector<unsigned>(1), host::Use::kState);
  host::launch(
      {blocks}, kStreamThreads, kSlots * kTileBytes, schedule,
      [&] { phases_in_turn({vectors(in), vectors(out), counter.data(), failed.data(), slabs, read, false}); },
      kSharedLimit);
  host::require(failed[0] == 0, "a wait gave up");
  require_equal(out, words, "phases");
}

template <Meet Way>
void add_exchanges(std::vector<host::Case>& cases, const std::string& way) {
  using host::Schedule;
  cases.push_back({way + "_pairs", "two blocks, one value each; and a last group of one",
                   [](const Schedule& s) { run_exchange<Way>(s, 3, 2, 2); }});
  cases.push_back({way + "_fewer_values_than_blocks", "a block publishes nothing",
                   [](const Schedule& s) { run_exchange<Way>(s, 4, 4, 3); }});
  cases.push_back({way + "_many_values", "more values than four a thread, not a multiple of blocks or threads",
                   [](const Schedule& s) { run_exchange<Way>(s, 4, 4, 301); }});
}

}  // namespace

int main(int argc, char** argv) {
  using host::Schedule;
  std::vector<host::Case> cases = {
      {"copy", "two whole blocks and a part", run_copy},
      {"sum", "a grid that strides", run_sum},
      {"write", "a whole block and a part", run_write},
      {"fill_16_rows", "rows of 64 bytes", [](const Schedule& s) { run_fill<Fill::kAsync16>(s, 12, 64); }},
      {"fill_8_rows", "rows of 128 bytes", [](const Schedule& s) { run_fill<Fill::kAsync8>(s, 5, 128); }},
      {"fill_4_flat", "one row, not a power of 2", [](const Schedule& s) { run_fill<Fill::kAsync4>(s, 1, 1040); }},
      {"fill_loads_rows", "more than a batch of loads", [](const Schedule& s) { run_fill<Fill::kLoads>(s, 40, 256); }},
      {"fill_loads_flat", "one row", [](const Schedule& s) { run_fill<Fill::kLoads>(s, 1, 2080); }},
      {"stream_sum", "fewer tiles than slots, and none for a block",
       [](const Schedule& s) { run_stream<Sink::kSum>(s, 3, 2); }},
      {"stream_write", "more tiles than slots: the ring turns",
       [](const Schedule& s) { run_stream<Sink::kWrite>(s, 2, 29); }},
      {"phases_read_write", "two slabs", [](const Schedule& s) { run_phases(s, 2, 2, true); }},
      {"phases_write", "only writes", [](const Schedule& s) { run_phases(s, 2, 2, false); }},
      {"scatter", "channels in unequal shares", [](const Schedule& s) { run_scatter(s, 4, 45); }},
  };
  add_exchanges<Meet::kCells>(cases, "cells");
  add_exchanges<Meet::kCounter>(cases, "counter");
  add_exchanges<Meet::kReleaseAcquire>(cases, "release_acquire");
  add_exchanges<Meet::kFlags>(cases, "flags");
  return host::run_cases(argc, argv, cases);
}
