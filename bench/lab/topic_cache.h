// The second-level cache: prefetches during a pause, and eviction hints for what is read again.
#pragma once

#include "topic_fill.h"

namespace gc::lab {

// Lines that one variant has wished to stay must not be in the way of the next. Within a variant they gather, as they
// do over the calls of a model.
inline void forget_wishes() {
  cudaDeviceSynchronize();
  if (cudaCtxResetPersistingL2Cache() != cudaSuccess) cudaGetLastError();  // a GPU without such lines
}

template <Prefetch Way>
void prefetch_variant(Lab& lab, const char* way, int pause_us, bool warm = false) {
  char name[96];
  std::snprintf(name, sizeof(name), "15 MB after %s, pause %d us", way, pause_us);
  lab.variant(name, [&](Row& row) {
    if (Way == Prefetch::kBulk && !lab.at_least(9)) throw Skipped("bulk prefetches need sm_90");
    forget_wishes();
    const int count = 15 * 1000 * 1000 / 16 / lab.blocks / 8 * 8;  // vectors a block, whole 128-byte lines
    const long long vectors = static_cast<long long>(count) * lab.blocks;
    const int threads = lab.blocks * kCacheThreads;
    DeviceArray<unsigned> sums(threads);
    row.cache = warm ? "warm" : "cold";
    row.bytes = vectors * 16.0;
    const auto launch = [&](long long place) {
      read_after_prefetch<Way><<<lab.blocks, kCacheThreads, 0, lab.stream>>>(
          {lab.source->data() + place, sums.data(), lab.spans->data(), count, static_cast<unsigned>(pause_us * 1000)});
    };
    sums.fill(0xff, lab.stream);
    launch(0);
    LAB_CUDA(cudaGetLastError());
    lab.require_sum(sums.data(), threads, lab.weighed_sum(lab.source->data(), vectors), "read");
    row.samples = lab.by_spans([&](int i) { launch(warm ? 0 : Lab::piece(i, vectors)); }, lab.blocks);
  });
}

template <Hint Passing, Hint Kept>
void reread_variant(Lab& lab, const char* hints, int megabytes, bool passing_last) {
  char name[128];
  std::snprintf(name, sizeof(name), "%d MB again, %s, %s", megabytes, passing_last ? "read last" : "read first", hints);
  lab.variant(name, [&](Row& row) {
    if (!lab.at_least(8)) throw Skipped("hints need sm_80");
    forget_wishes();
    const int passing_count = megabytes * 1000 * 1000 / 16 / lab.blocks / 8 * 8;
    const int kept_count = kSlots * kTileVectors;
    const long long passing = static_cast<long long>(passing_count) * lab.blocks;
    const long long kept = static_cast<long long>(kept_count) * lab.blocks;
    const int threads = lab.blocks * kCacheThreads;
    DeviceArray<unsigned> sums(static_cast<std::size_t>(3) * threads), counter(1);
    row.cache = "what the hints leave";
    row.bytes = passing * 16.0;
    const auto launch = [&](int i) {
      counter.fill(0, lab.stream);
      const Vec16* const first = lab.source->data() + Lab::piece(i, passing + kept);
      read_again<Passing, Kept><<<lab.blocks, kCacheThreads, 0, lab.stream>>>(
          {first, first + passing, sums.data(), counter.data(), lab.failed->data(), lab.spans->data(), passing_count,
           kept_count, passing_last});
    };
    sums.fill(0xff, lab.stream);
    launch(0);
    LAB_CUDA(cudaGetLastError());
    const unsigned wanted = lab.weighed_sum(lab.source->data(), passing);
    lab.require_sum(sums.data(), threads, wanted, "first read");
    lab.require_sum(sums.data() + 2 * threads, threads, wanted, "second read");
    lab.require_sum(sums.data() + threads, threads, lab.weighed_sum(lab.source->data() + passing, kept), "other read");
    row.samples = lab.by_spans(launch, lab.blocks);
  });
}

inline void topic_cache(Lab& lab) {
  lab.take_memory();
  copy_by_spans(lab, "copy", 15 * 1000 * 1000 / 32);
  for (const int pause_us : {0, 5, 10}) {
    prefetch_variant<Prefetch::kNone>(lab, "no prefetch", pause_us);
    prefetch_variant<Prefetch::kLines>(lab, "prefetch.global.L2", pause_us);
    prefetch_variant<Prefetch::kBulk>(lab, "cp.async.bulk.prefetch.L2", pause_us);
  }
  prefetch_variant<Prefetch::kNone>(lab, "reading it before", 5, true);
  for (const int megabytes : {6, 12, 20}) {
    for (const bool passing_last : {true, false}) {
      reread_variant<Hint::kNone, Hint::kNone>(lab, "no hints", megabytes, passing_last);
      reread_variant<Hint::kEvictLast, Hint::kNone>(lab, "evict_last", megabytes, passing_last);
      reread_variant<Hint::kNone, Hint::kEvictFirst>(lab, "others evict_first", megabytes, passing_last);
      reread_variant<Hint::kEvictLast, Hint::kEvictFirst>(lab, "evict_last, others evict_first", megabytes,
                                                          passing_last);
    }
  }
}

}  // namespace gc::lab
