// Filling 208 KB of shared memory a multiprocessor, and phases of reading and writing, each beside the copy.
#pragma once

#include "topic_copy.h"

namespace gc::lab {

inline long long slab_vectors(const Lab& lab) { return static_cast<long long>(lab.blocks) * kSlots * kTileVectors; }

template <Fill Way>
void fill_variant(Lab& lab, const char* way, int row_bytes, int threads) {
  const std::string rows = row_bytes == 0 ? "flat" : "rows of " + std::to_string(row_bytes);
  lab.variant("fill " + std::string(way) + ", " + rows + ", " + std::to_string(threads) + " threads", [&](Row& row) {
    if (Way == Fill::kBulk && !lab.at_least(9)) throw Skipped("bulk copies need sm_90");
    if (Way != Fill::kLoads && !lab.at_least(8)) throw Skipped("cp.async needs sm_80");
    lab.allow_shared(fill_shared<Way>, kFullSharedBytes);
    constexpr int kSlabBytes = kSlots * kTileBytes;
    const long long vectors = slab_vectors(lab);
    row.cache = "cold";
    row.bytes = vectors * 16.0;
    const auto launch = [&](long long place, bool check) {
      FillArgs args{};
      args.in = reinterpret_cast<const unsigned char*>(lab.source->data() + place);
      args.out = check ? reinterpret_cast<unsigned char*>(lab.target->data() + place) : nullptr;
      args.failed = lab.failed->data();
      args.spans = lab.spans->data();
      args.rows = row_bytes == 0 ? 1 : kSlabBytes / row_bytes;
      args.row_bytes = row_bytes == 0 ? kSlabBytes : row_bytes;
      args.row_shift = 30;
      for (int shift = 0; shift < 30; ++shift) {
        if (1 << shift == row_bytes) args.row_shift = shift;
      }
      fill_shared<Way><<<lab.blocks, threads, kFullSharedBytes, lab.stream>>>(args);
    };
    lab.poison(lab.target->data(), vectors);
    launch(0, true);
    LAB_CUDA(cudaGetLastError());
    lab.require_same(lab.source->data(), lab.target->data(), vectors, "fill");
    row.samples = lab.by_spans([&](int i) { launch(Lab::piece(i, vectors), false); }, lab.blocks);
  });
}

// Reads by plain loads and a large grid: the rate at which DRAM gives.
inline void read_by_spans(Lab& lab, const std::string& name, long long vectors, bool warm) {
  lab.variant(name, [&](Row& row) {
    row.cache = warm ? "warm" : "cold";
    row.bytes = vectors * 16.0;
    const int grid = 4 * lab.blocks;
    DeviceArray<unsigned> sums(static_cast<std::size_t>(grid) * 512);
    const auto launch = [&](long long place) {
      sum_words<<<grid, 512, 0, lab.stream>>>(
          {lab.source->data() + place, sums.data(), lab.spans->data(), static_cast<int>(vectors)});
    };
    sums.fill(0xff, lab.stream);
    launch(0);
    LAB_CUDA(cudaGetLastError());
    lab.require_sum(sums.data(), grid * 512, lab.weighed_sum(lab.source->data(), vectors), "read");
    row.samples = lab.by_spans([&](int i) { launch(warm ? 0 : Lab::piece(i, vectors)); }, grid);
  });
}

template <Fill Way>
void fill_variants(Lab& lab, const char* way) {
  for (const int threads : {256, 512}) {
    for (const int row_bytes : {64, 128, 256, 512, 0}) fill_variant<Way>(lab, way, row_bytes, threads);
  }
}

inline void topic_fill(Lab& lab) {
  lab.take_memory();
  copy_by_spans(lab, "copy", slab_vectors(lab) / 2);
  read_by_spans(lab, "read by loads, large grid", slab_vectors(lab), false);
  fill_variants<Fill::kAsync16>(lab, "cp.async 16");
  fill_variants<Fill::kAsync8>(lab, "cp.async 8");
  fill_variants<Fill::kAsync4>(lab, "cp.async 4");
  fill_variants<Fill::kBulk>(lab, "bulk");
  fill_variants<Fill::kLoads>(lab, "loads");
}

// --- steady state and phases: what a further slab of all blocks (28 MB on an H100) costs, launches of 2 and of 10 ---

constexpr int kFewSlabs = 2, kManySlabs = 10;

// Where the i-th launch of so many slabs finds memory that is not in the cache.
inline long long slabs_at(const Lab& lab, int i, int slabs) { return Lab::piece(i, slab_vectors(lab) * slabs); }

// launch(place, slabs) reads slabs from the source and writes them to the target, at this place.
inline void slab_variant(Lab& lab, const std::string& name, double bytes_a_vector, bool checked_as_copy,
                         const std::function<void()>& prepare,
                         const std::function<void(long long place, int slabs)>& launch) {
  lab.variant(name, [&](Row& row) {
    prepare();
    const long long vectors = slab_vectors(lab);
    row.cache = "cold";
    row.bytes = vectors * bytes_a_vector;
    if (checked_as_copy) {
      for (const int slabs : {1, kFewSlabs}) {
        check_copy(lab, 0, vectors * slabs, [&] { launch(0, slabs); });
      }
    }
    row.samples =
        lab.by_slope([&](int i, int slabs) { launch(slabs_at(lab, i, slabs), slabs); }, kFewSlabs, kManySlabs);
  });
}

template <bool Bulk, Sink To>
void stream_variant(Lab& lab, const std::string& name) {
  constexpr bool kWrites = To == Sink::kWrite;
  DeviceArray<unsigned> sums(static_cast<std::size_t>(lab.blocks) * kStreamThreads);
  const long long vectors = slab_vectors(lab);
  const auto launch = [&](long long place, int slabs) {
    StreamArgs args{lab.source->data() + place, lab.target->data() + place, sums.data(), lab.failed->data(),
                    static_cast<int>(vectors * slabs / kTileVectors)};
    stream_tiles<Bulk, To><<<lab.blocks, kStreamThreads, kFullSharedBytes, lab.stream>>>(args);
  };
  const auto prepare = [&] {
    if (!lab.at_least(Bulk ? 9 : 8)) throw Skipped("needs a newer GPU");
    lab.allow_shared(stream_tiles<Bulk, To>, kFullSharedBytes);
    if (kWrites) return;
    sums.fill(0xff, lab.stream);
    launch(0, 2);
    LAB_CUDA(cudaGetLastError());
    lab.require_sum(sums.data(), lab.blocks * kStreamThreads, lab.weighed_sum(lab.source->data(), vectors * 2), name);
  };
  slab_variant(lab, name, kWrites ? 32 : 16, kWrites, prepare, launch);
}

inline void phase_variant(Lab& lab, const std::string& name, bool read, bool bulk) {
  DeviceArray<unsigned> counter(1);
  const long long vectors = slab_vectors(lab);
  const auto launch = [&](long long place, int slabs) {
    counter.fill(0, lab.stream);
    PhaseArgs args{};
    args.in = lab.source->data() + place;
    args.out = lab.target->data() + place;
    args.counter = counter.data();
    args.failed = lab.failed->data();
    args.slabs = slabs;
    args.read = read;
    args.bulk = bulk;
    phases_in_turn<<<lab.blocks, kStreamThreads, kFullSharedBytes, lab.stream>>>(args);
  };
  const auto prepare = [&] {
    if (!lab.at_least(bulk ? 9 : 8)) throw Skipped("needs a newer GPU");
    lab.allow_shared(phases_in_turn, kFullSharedBytes);
    if (read) return;
    // The first slab that is written has the words of the source.
    check_copy(lab, 0, vectors, [&] { launch(0, 1); });
  };
  slab_variant(lab, name, read ? 32 : 16, read, prepare, launch);
}

inline void topic_phases(Lab& lab) {
  lab.take_memory();
  const long long vectors = slab_vectors(lab);
  const auto nothing = [] {};
  slab_variant(lab, "copy", 32, true, nothing,
               [&](long long place, int slabs) { launch_copy(lab, place, vectors * slabs); });
  stream_variant<false, Sink::kSum>(lab, "read, ring of cp.async");
  stream_variant<true, Sink::kSum>(lab, "read, ring of bulk copies");
  lab.variant("read, large grid", [&](Row& row) {
    row.cache = "cold";
    row.bytes = vectors * 16.0;
    const int grid = 4 * lab.blocks;
    DeviceArray<unsigned> sums(static_cast<std::size_t>(grid) * 512);
    const auto launch = [&](int i, int slabs) {
      sum_words<<<grid, 512, 0, lab.stream>>>(
          {lab.source->data() + slabs_at(lab, i, slabs), sums.data(), nullptr, static_cast<int>(vectors * slabs)});
    };
    launch(0, 1);
    lab.require_sum(sums.data(), grid * 512, lab.weighed_sum(lab.source->data(), vectors), "read");
    row.samples = lab.by_slope(launch, kFewSlabs, kManySlabs);
  });
  slab_variant(
      lab, "write, large grid", 16, false,
      [&] {
        check_copy(lab, 0, vectors, [&] {
          write_random<<<copy_grid(vectors), kCopyThreads, 0, lab.stream>>>(
              {lab.target->data(), nullptr, static_cast<int>(vectors)});
        });
      },
      [&](long long place, int slabs) {
        write_random<<<copy_grid(vectors * slabs), kCopyThreads, 0, lab.stream>>>(
            {lab.target->data() + place, nullptr, static_cast<int>(vectors * slabs)});
      });
  phase_variant(lab, "write, from shared memory", false, false);
  phase_variant(lab, "write, bulk copies from shared memory", false, true);
  phase_variant(lab, "read then write, in turn", true, false);
  phase_variant(lab, "read then write, in turn, bulk stores", true, true);
  stream_variant<false, Sink::kWrite>(lab, "read and write mixed, ring of cp.async");
  stream_variant<true, Sink::kWrite>(lab, "read and write mixed, ring of bulk copies");
}

}  // namespace gc::lab
