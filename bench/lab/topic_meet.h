// Ways for blocks to meet: cells, counters, flags, clusters. Every launch's values are checked, timed or not.
#pragma once

#include "cluster_kernels.h"
#include "expected.h"
#include "run.h"

namespace gc::lab {

constexpr int kFewRounds = 33, kManyRounds = 257;

// Times an exchange: the longest block's time from its first round to its last, a round (the row), and, as launches
// have few or many rounds in turn, the difference of the whole grid's times, a round (its note). `launch` zeroes what
// must be zero and launches; `check` looks at what came out.
inline void time_rounds(Lab& lab, Row& row, int blocks, const std::function<void(int rounds)>& launch,
                        const std::function<void(int rounds)>& check) {
  std::vector<double> whole[2];
  for (int i = -2; i < lab.repeats; ++i) {
    for (const int rounds : {kFewRounds, kManyRounds}) {
      launch(rounds);
      LAB_CUDA(cudaGetLastError());
      LAB_CUDA(cudaStreamSynchronize(lab.stream));
      lab.require_no_timeout();
      check(rounds);
      const std::vector<Span> spans = lab.read_spans(blocks);
      double longest = 0;
      U64 first = ~0ull, last = 0;
      for (const Span& span : spans) {
        longest = std::max(longest, (span.end - span.begin) * 1e-3);
        first = std::min(first, span.begin), last = std::max(last, span.end);
      }
      if (i < 0) continue;
      if (rounds == kManyRounds) row.samples.push_back(longest / (rounds - 1));
      whole[rounds == kManyRounds].push_back((last - first) * 1e-3);
    }
  }
  Row few, many;
  few.samples = whole[0], many.samples = whole[1];
  row.note = format("by the difference of %g and %g rounds: %.3f", kManyRounds, kFewRounds,
                    (many.median() - few.median()) / (kManyRounds - kFewRounds));
}

template <Meet Way>
void exchange_variant(Lab& lab, const char* way, const char* size, int group, int count) {
  lab.variant(std::string(way) + " " + size, [&](Row& row) {
    lab.allow_shared(exchange<Way>, kFullSharedBytes);
    const int blocks = lab.blocks;
    const int groups = (blocks + group - 1) / group;
    DeviceArray<Cell> cells(2 * groups * count);
    DeviceArray<unsigned> words(2 * groups * count), counter(groups * 32), flags(blocks), out(blocks * count);
    const std::vector<unsigned> wanted[2] = {expected_exchange(blocks, group, count, kFewRounds),
                                             expected_exchange(blocks, group, count, kManyRounds)};
    time_rounds(
        lab, row, blocks,
        [&](int rounds) {
          cells.fill(0, lab.stream), words.fill(0xff, lab.stream), counter.fill(0, lab.stream);
          flags.fill(0, lab.stream), out.fill(0xff, lab.stream);
          exchange<Way><<<blocks, kMeetThreads, kFullSharedBytes, lab.stream>>>(
              {cells.data(), words.data(), counter.data(), flags.data(), out.data(), lab.failed->data(),
               lab.spans->data(), group, count, rounds});
        },
        [&](int rounds) {
          require(out.read() == wanted[rounds == kManyRounds], "values after the last round differ");
        });
  });
}

template <Meet Way>
void exchange_variants(Lab& lab, const char* way) {
  exchange_variant<Way>(lab, way, "2", 2, 2);
  exchange_variant<Way>(lab, way, "16", 16, 16);
  exchange_variant<Way>(lab, way, "all", lab.blocks, lab.blocks);
  exchange_variant<Way>(lab, way, "2048", lab.blocks, kMaxCells);
}

inline void scatter_variant(Lab& lab, int count) {
  lab.variant("cells scattered " + std::to_string(count), [&](Row& row) {
    lab.allow_shared(scatter_cells, kFullSharedBytes);
    const int blocks = lab.blocks;
    require(count >= blocks, "fewer channels than blocks");
    DeviceArray<Cell> cells(static_cast<std::size_t>(2) * blocks * count);
    DeviceArray<unsigned> out(blocks);
    const std::vector<unsigned> wanted[2] = {expected_scatter(blocks, count, kFewRounds),
                                             expected_scatter(blocks, count, kManyRounds)};
    time_rounds(
        lab, row, blocks,
        [&](int rounds) {
          cells.fill(0, lab.stream), out.fill(0xff, lab.stream);
          scatter_cells<<<blocks, kMeetThreads, kFullSharedBytes, lab.stream>>>(
              {cells.data(), out.data(), lab.failed->data(), lab.spans->data(), count, rounds});
        },
        [&](int rounds) {
          require(out.read() == wanted[rounds == kManyRounds], "states after the last round differ");
        });
  });
}

// A launch of persistent blocks in clusters of so many.
struct ClusterLaunch {
  ClusterLaunch(cudaStream_t stream, int grid, int size) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kMeetThreads);
    config.dynamicSmemBytes = kFullSharedBytes;
    config.stream = stream;
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = size;
    attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute[1] = {};
};

template <bool Async>
int resident_clusters(Lab& lab, int size) {
  if (!lab.at_least(9)) throw Skipped("clusters need sm_90");
  lab.allow_shared(exchange_in_cluster<Async>, kFullSharedBytes);
  if (size > 8) {
    LAB_CUDA(cudaFuncSetAttribute(exchange_in_cluster<Async>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  ClusterLaunch launch(lab.stream, size, size);
  int clusters = 0;
  LAB_CUDA(cudaOccupancyMaxActiveClusters(&clusters, exchange_in_cluster<Async>, &launch.config));
  if (clusters == 0) throw Skipped("no such cluster with 208 KB a block fits");
  return clusters;
}

template <bool Async>
void cluster_variant(Lab& lab, int size, int count) {
  const std::string name = "cluster of " + std::to_string(size) + (Async ? " st.async " : " barrier ");
  lab.variant(name + std::to_string(count), [&](Row& row) {
    const int clusters = std::min(resident_clusters<Async>(lab, size), lab.blocks / size);
    const int blocks = clusters * size;
    DeviceArray<unsigned> out(static_cast<std::size_t>(blocks) * count);
    const std::vector<unsigned> wanted[2] = {expected_exchange(blocks, size, count, kFewRounds),
                                             expected_exchange(blocks, size, count, kManyRounds)};
    ClusterLaunch launch(lab.stream, blocks, size);
    time_rounds(
        lab, row, blocks,
        [&](int rounds) {
          out.fill(0xff, lab.stream);
          LAB_CUDA(cudaLaunchKernelEx(&launch.config, exchange_in_cluster<Async>,
                                      ClusterArgs{out.data(), lab.failed->data(), lab.spans->data(), count, rounds}));
        },
        [&](int rounds) {
          require(out.read() == wanted[rounds == kManyRounds], "values after the last round differ");
        });
  });
}

inline void topic_meet(Lab& lab) {
  exchange_variants<Meet::kCells>(lab, "cells");
  exchange_variants<Meet::kCounter>(lab, "counter");
  exchange_variants<Meet::kReleaseAcquire>(lab, "release/acquire");
  exchange_variants<Meet::kFlags>(lab, "flags");
  scatter_variant(lab, 512);
  scatter_variant(lab, 2048);
  for (const int size : {2, 4, 8, 16}) {
    lab.variant("clusters of " + std::to_string(size) + " resident", [&](Row& row) {
      row.unit = "SMs";
      const int clusters = resident_clusters<true>(lab, size);
      row.samples.push_back(clusters * size);
      row.note = std::to_string(clusters) + " clusters with 208 KB a block, of " + std::to_string(lab.blocks) + " SMs";
    });
    cluster_variant<true>(lab, size, size);
    cluster_variant<true>(lab, size, kMaxCells);
    cluster_variant<false>(lab, size, size);
    cluster_variant<false>(lab, size, kMaxCells);
  }
}

}  // namespace gc::lab
