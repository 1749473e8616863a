// The copy at 4 to 275 MB moved: what is the kernel, what the launch, what the host, in the stream and in a graph.
#pragma once

#include "run.h"

namespace gc::lab {

inline int copy_grid(long long vectors) {
  return static_cast<int>((vectors + kCopyThreads * kCopyBatch - 1) / (kCopyThreads * kCopyBatch));
}

// Copies a piece of the laboratory's memory.
inline void launch_copy(Lab& lab, long long place, long long vectors, Span* spans = nullptr) {
  copy_vectors<<<copy_grid(vectors), kCopyThreads, 0, lab.stream>>>(
      {lab.source->data() + place, lab.target->data() + place, spans, static_cast<int>(vectors)});
}

inline void check_copy(Lab& lab, long long place, long long vectors, const std::function<void()>& run) {
  lab.poison(lab.target->data() + place, vectors);
  run();
  LAB_CUDA(cudaGetLastError());
  lab.require_same(lab.source->data() + place, lab.target->data() + place, vectors, "copy");
}

// A copy by spans, for the topics that measure so: the yardstick beside them, of so many bytes moved.
inline void copy_by_spans(Lab& lab, const std::string& name, long long vectors) {
  lab.variant(name, [&](Row& row) {
    row.cache = "cold";
    row.bytes = vectors * 32.0;
    check_copy(lab, 0, vectors, [&] { launch_copy(lab, 0, vectors, lab.spans->data()); });
    row.samples = lab.by_spans([&](int i) { launch_copy(lab, Lab::piece(i, vectors), vectors, lab.spans->data()); },
                               copy_grid(vectors));
  });
}

inline void topic_copy(Lab& lab) {
  lab.take_memory();
  lab.variant("clock", [&](Row& row) {
    row.unit = "MHz";
    DeviceArray<U64> clocks(3);
    for (int i = 0; i < lab.repeats; ++i) {
      measure_clock<<<1, 32, 0, lab.stream>>>(clocks.data(), 100 * 1000);
      LAB_CUDA(cudaGetLastError());
      LAB_CUDA(cudaStreamSynchronize(lab.stream));
      const std::vector<U64> found = clocks.read();
      require(found[1] > 0, "the global timer stands still");
      row.samples.push_back(1e3 * found[0] / found[1]);
    }
    row.note = "the global timer's least step is " + std::to_string(lab.timer_step_ns) + " ns";
    if (lab.timer_step_ns > Lab::kFineTimerNs)
      row.note += ": times within kernels are those of the longest block, by its cycles";
  });
  lab.variant("events alone", [&](Row& row) { row.samples = lab.by_events([](int) {}, 200); });
  lab.variant("empty kernel, queued", [&](Row& row) {
    row.samples = lab.by_events([&](int) { do_nothing<<<1, 32, 0, lab.stream>>>({}); }, 200);
  });

  for (const int megabytes : {4, 8, 17, 34, 69, 140, 275}) {
    const long long vectors = megabytes * 1000LL * 1000 / 32 / 64 * 64;  // half of the bytes are read
    char size[32];
    std::snprintf(size, sizeof(size), "%d MB", megabytes);
    const auto named = [&](const char* how) { return std::string(how) + " " + size; };
    const auto begin = [&](Row& row) {
      row.cache = "cold";
      row.bytes = vectors * 32.0;
    };
    copy_by_spans(lab, named("span"), vectors);
    for (const bool queued : {false, true}) {
      const unsigned hold_us = queued ? 300 : 0;
      lab.variant(named(queued ? "stream queued" : "stream"), [&](Row& row) {
        begin(row);
        check_copy(lab, 0, vectors, [&] { launch_copy(lab, 0, vectors); });
        row.samples = lab.by_events([&](int i) { launch_copy(lab, Lab::piece(i, vectors), vectors); }, hold_us);
      });
      lab.variant(named(queued ? "graph queued" : "graph"), [&](Row& row) {
        begin(row);
        std::vector<std::unique_ptr<Graph>> graphs;
        for (int i = 0; i < lab.repeats + 2; ++i) {
          graphs.push_back(
              std::make_unique<Graph>(lab.stream, [&] { launch_copy(lab, Lab::piece(i, vectors), vectors); }));
        }
        check_copy(lab, 0, vectors, [&] { graphs[0]->replay(); });
        row.samples = lab.by_events([&](int i) { graphs[i]->replay(); }, hold_us);
      });
    }
    lab.variant(named("graph chain"), [&](Row& row) {
      begin(row);
      const auto chain = [&](int nodes) {
        return std::make_unique<Graph>(lab.stream, [&lab, nodes, vectors] {
          for (int i = 0; i < nodes; ++i) launch_copy(lab, Lab::piece(i, vectors), vectors);
        });
      };
      constexpr int kFew = 8, kMany = 40;
      const auto few = chain(kFew), many = chain(kMany);
      check_copy(lab, 0, vectors, [&] { few->replay(); });
      row.samples = lab.by_slope([&](int, int nodes) { (nodes == kFew ? few : many)->replay(); }, kFew, kMany);
    });
    lab.variant(named("memcpy queued"), [&](Row& row) {
      begin(row);
      const auto copy = [&](int i) {
        const long long place = Lab::piece(i, vectors);
        LAB_CUDA(cudaMemcpyAsync(lab.target->data() + place, lab.source->data() + place, vectors * sizeof(Vec16),
                                 cudaMemcpyDeviceToDevice, lab.stream));
      };
      check_copy(lab, 0, vectors, [&] { copy(0); });
      row.samples = lab.by_events(copy, 300);
    });
  }
}

}  // namespace gc::lab
