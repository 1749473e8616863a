// Launches: programmatic dependent ones, ordinary and cooperative ones beside a kernel that holds half of the GPU, and
// what the host pays.
#pragma once

#include "run.h"

namespace gc::lab {

// --- programmatic dependent launch ---

// `triples` times three small kernels, each of which reads what the one before wrote.
class StepChain {
 public:
  explicit StepChain(Lab& lab)
      : lab_(lab), words_(static_cast<std::size_t>(lab.blocks) * 512), first_(words_), second_(words_) {}

  void launch(bool programmatic, int triples) {
    cudaLaunchAttribute attribute[1] = {};
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(lab_.blocks);
    config.blockDim = dim3(512);
    config.stream = lab_.stream;
    config.attrs = attribute;
    config.numAttrs = programmatic ? 1 : 0;
    for (int i = 0; i < 3 * triples; ++i) {
      const StepArgs args =
          i % 2 == 0 ? StepArgs{first_.data(), second_.data()} : StepArgs{second_.data(), first_.data()};
      LAB_CUDA(cudaLaunchKernelEx(&config, programmatic ? small_step<true> : small_step<false>, args));
    }
  }

  void check(int triples, const std::function<void()>& run) {
    std::vector<unsigned> host(words_);
    for (std::size_t i = 0; i < words_; ++i) host[i] = random_word(static_cast<unsigned>(i));
    LAB_CUDA(cudaMemcpy(first_.data(), host.data(), first_.bytes(), cudaMemcpyHostToDevice));
    LAB_CUDA(cudaDeviceSynchronize());  // a copy of pageable memory may still be under way
    second_.fill(0xff, lab_.stream);
    run();
    LAB_CUDA(cudaStreamSynchronize(lab_.stream));
    for (unsigned& word : host) {
      for (int i = 0; i < 3 * triples; ++i) word = stepped(word);
    }
    require((3 * triples % 2 == 0 ? first_ : second_).read() == host, "words after the last step differ");
  }

 private:
  Lab& lab_;
  std::size_t words_;
  DeviceArray<unsigned> first_, second_;
};

inline void pdl_variants(Lab& lab) {
  constexpr int kTriples = 20;
  for (const bool programmatic : {false, true}) {
    const std::string suffix = programmatic ? ", PDL" : "";
    const auto begin = [&, programmatic] {
      if (programmatic && !lab.at_least(9)) throw Skipped("PDL needs sm_90");
    };
    const auto triples = [](Row& row, double count) {
      for (double& sample : row.samples) sample /= count;
      row.note = format("the mean of %g", count);
    };
    lab.variant("three small kernels, stream" + suffix, [&](Row& row) {
      begin();
      StepChain chain(lab);
      chain.check(kTriples, [&] { chain.launch(programmatic, kTriples); });
      row.samples = lab.by_events([&](int) { chain.launch(programmatic, kTriples); }, 4000);
      triples(row, kTriples);
    });
    lab.variant("three small kernels, graph" + suffix, [&](Row& row) {
      begin();
      StepChain chain(lab);
      const Graph graph(lab.stream, [&] { chain.launch(programmatic, kTriples); });
      chain.check(kTriples, [&] { graph.replay(); });
      row.samples = lab.by_events([&](int) { graph.replay(); }, 300);
      triples(row, kTriples);
    });
    lab.variant("three small kernels once, graph" + suffix, [&](Row& row) {
      begin();
      StepChain chain(lab);
      const Graph graph(lab.stream, [&] { chain.launch(programmatic, 1); });
      chain.check(1, [&] { graph.replay(); });
      row.samples = lab.by_events([&](int) { graph.replay(); }, 300);
    });
  }
}

// --- ordinary and cooperative launches of a persistent grid ---

struct Meeting {
  explicit Meeting(Lab& lab) : cells(lab.blocks), claims(lab.blocks), out(lab.blocks), own(lab.blocks), lab(lab) {}

  void prepare() {
    cells.fill(0, lab.stream), claims.fill(0, lab.stream), out.fill(0xff, lab.stream), own.fill(0, lab.stream);
    LAB_CUDA(cudaStreamSynchronize(lab.stream));
  }

  void launch(bool cooperative, U64 patience_ns, U64 limit_ns) {
    launch(cooperative, patience_ns, limit_ns, lab.stream);
  }

  void launch(bool cooperative, U64 patience_ns, U64 limit_ns, cudaStream_t stream) {
    RoleArgs args{cells.data(), claims.data(), out.data(), lab.failed->data(), own.data(), patience_ns, limit_ns};
    cudaLaunchAttribute attribute[1] = {};
    attribute[0].id = cudaLaunchAttributeCooperative;
    attribute[0].val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(lab.blocks);
    config.blockDim = dim3(kMeetThreads);
    config.dynamicSmemBytes = kFullSharedBytes;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = cooperative ? 1 : 0;
    LAB_CUDA(cudaLaunchKernelEx(&config, meet_by_roles, args));
  }

  void check() const {
    unsigned sum = 0;
    for (int i = 0; i < lab.blocks; ++i) sum += role_value(i);
    const std::vector<unsigned> found = out.read();
    require(std::all_of(found.begin(), found.end(), [sum](unsigned one) { return one == sum; }),
            "a role's sum differs");
  }

  DeviceArray<Cell> cells;
  DeviceArray<unsigned> claims, out;
  DeviceArray<Span> own;
  Lab& lab;
};

constexpr U64 kNever = 1000ull * 1000 * 1000, kHoldNs = 2ull * 1000 * 1000, kGiveUpNs = 100ull * 1000 * 1000;

// A kernel on a stream of its own that takes so many multiprocessors for 2 ms.
class Holder {
 public:
  Holder(Lab& lab, int blocks) : blocks_(blocks), arrivals_(1), ends_(blocks) {
    lab.allow_shared(hold_multiprocessors, kFullSharedBytes);
    LAB_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    LAB_CUDA(cudaHostAlloc(&running_, sizeof(unsigned), cudaHostAllocMapped));
  }
  Holder(const Holder&) = delete;
  ~Holder() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaFreeHost(running_);
  }

  // Returns when all its blocks run.
  void start() {
    *running_ = 0;
    arrivals_.fill(0, stream_);
    unsigned* mapped = nullptr;
    LAB_CUDA(cudaHostGetDevicePointer(&mapped, running_, 0));
    hold_multiprocessors<<<blocks_, 32, kFullSharedBytes, stream_>>>({mapped, arrivals_.data(), ends_.data(), kHoldNs});
    LAB_CUDA(cudaGetLastError());
    const auto begin = std::chrono::steady_clock::now();
    while (*const_cast<volatile unsigned*>(running_) != static_cast<unsigned>(blocks_)) {
      require(std::chrono::steady_clock::now() - begin < std::chrono::seconds(2), "the holding kernel did not start");
    }
  }

  // When its first block left, by the global timer.
  U64 first_end() {
    LAB_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<U64> ends = ends_.read();
    return *std::min_element(ends.begin(), ends.end());
  }

 private:
  int blocks_;
  DeviceArray<unsigned> arrivals_;
  DeviceArray<U64> ends_;
  cudaStream_t stream_ = nullptr;
  unsigned* running_ = nullptr;
};

inline void meeting_variants(Lab& lab) {
  for (const bool cooperative : {false, true}) {
    const std::string launch = cooperative ? "cooperative" : "ordinary";
    lab.variant(launch + " launch and one exchange, idle GPU", [&](Row& row) {
      lab.allow_shared(meet_by_roles, kFullSharedBytes);
      Meeting meeting(lab);
      for (int i = -2; i < lab.repeats; ++i) {
        std::vector<double> one = lab.by_events(
            [&](int) {
              meeting.cells.fill(0, lab.stream), meeting.claims.fill(0, lab.stream);
              meeting.out.fill(0xff, lab.stream);
              meeting.launch(cooperative, kNever, kGiveUpNs);
            },
            300, 1);
        meeting.check();
        if (i >= 0) row.samples.push_back(one[0]);
      }
      row.note = "with three fills before it";
    });
    for (const bool adopting : {false, true}) {
      if (cooperative && adopting) continue;  // all its blocks run from the start
      lab.variant(launch + (adopting ? " launch, half held, roles adopted after 20 us" : " launch, half held"),
                  [&](Row& row) {
                    lab.allow_shared(meet_by_roles, kFullSharedBytes);
                    Meeting meeting(lab);
                    Holder holder(lab, lab.blocks / 2);
                    double early = 0, latest = 0;
                    for (int i = -1; i < std::min(lab.repeats, 20); ++i) {
                      meeting.prepare();
                      meeting.launch(cooperative, kNever, kGiveUpNs);  // loads the kernel while nothing is held
                      LAB_CUDA(cudaStreamSynchronize(lab.stream));
                      meeting.prepare();
                      holder.start();
                      meeting.launch(cooperative, adopting ? 20 * 1000 : kNever, kGiveUpNs);
                      const U64 freed = holder.first_end();
                      LAB_CUDA(cudaStreamSynchronize(lab.stream));
                      lab.require_no_timeout();
                      meeting.check();
                      U64 first = ~0ull, last = 0;
                      int before = 0;
                      for (const Span& span : meeting.own.read()) {
                        last = std::max(last, span.end);
                        if (span.begin == 0) continue;
                        first = std::min(first, span.begin);
                        before += span.begin < freed;
                      }
                      if (i < 0) continue;
                      early += before;
                      latest += (static_cast<double>(last) - static_cast<double>(freed)) * 1e-3;
                      row.samples.push_back((last - first) * 1e-3);
                    }
                    row.note = format(
                        "from the first block's start to the last role's end; on average %.0f blocks ran before the "
                        "holder left, the last role ended %.0f us after that",
                        early / row.samples.size(), latest / row.samples.size());
                  });
    }
  }
}

// Two grids that each want all multiprocessors, on two streams, both queued behind a kernel that holds them all: when
// it leaves, each may get a part.
inline void two_streams_variants(Lab& lab) {
  for (const bool adopting : {false, true}) {
    lab.variant(adopting ? "two ordinary launches at once, roles adopted after 20 us" : "two ordinary launches at once",
                [&](Row& row) {
                  lab.allow_shared(meet_by_roles, kFullSharedBytes);
                  Meeting first(lab), second(lab);
                  Holder holder(lab, lab.blocks);
                  cudaStream_t other = nullptr;
                  LAB_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
                  const U64 patience = adopting ? 20 * 1000 : kNever, limit = 10ull * 1000 * 1000;
                  int over = 0, mixed = 0;
                  const int repeats = std::min(lab.repeats, 20);
                  for (int i = -1; i < repeats; ++i) {
                    first.prepare(), second.prepare();
                    holder.start();
                    first.launch(false, patience, limit, lab.stream);
                    second.launch(false, patience, limit, other);
                    holder.first_end();
                    LAB_CUDA(cudaDeviceSynchronize());
                    const bool gave_up = lab.failed->read()[0] != 0;
                    lab.failed->fill(0, lab.stream);
                    LAB_CUDA(cudaStreamSynchronize(lab.stream));
                    if (i < 0) continue;
                    over += gave_up;
                    if (gave_up) continue;
                    first.check(), second.check();
                    U64 begins[2] = {~0ull, ~0ull}, ends[2] = {0, 0};
                    for (int k = 0; k < 2; ++k) {
                      for (const Span& span : (k == 0 ? first : second).own.read()) {
                        if (span.begin != 0) begins[k] = std::min(begins[k], span.begin);
                        ends[k] = std::max(ends[k], span.end);
                      }
                    }
                    mixed += begins[0] < ends[1] && begins[1] < ends[0];
                    row.samples.push_back((std::max(ends[0], ends[1]) - std::min(begins[0], begins[1])) * 1e-3);
                  }
                  LAB_CUDA(cudaStreamDestroy(other));
                  if (row.samples.empty()) row.samples.push_back(limit * 1e-3);
                  row.note = format(
                      "from the first block's start to the last role's end of both; ran at once in %.0f "
                      "of %.0f, blocked each other for 10 ms in %.0f",
                      static_cast<double>(mixed), static_cast<double>(repeats), static_cast<double>(over));
                });
  }
}

// --- what the host pays ---

inline void host_variant(Lab& lab, const std::string& name, const std::function<void()>& call) {
  lab.variant(name, [&](Row& row) {
    constexpr int kCalls = 200;  // fits the launch queue
    for (int i = -2; i < lab.repeats; ++i) {
      LAB_CUDA(cudaStreamSynchronize(lab.stream));
      const auto begin = std::chrono::steady_clock::now();
      for (int k = 0; k < kCalls; ++k) call();
      const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
      if (i >= 0) row.samples.push_back(took.count() / kCalls);
    }
    row.note = "host time a call, mean of 200";
  });
}

inline void host_variants(Lab& lab) {
  const FillArgs args{};
  cudaLaunchAttribute attribute[1] = {};
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(lab.blocks);
  config.blockDim = dim3(32);
  config.stream = lab.stream;
  config.attrs = attribute;
  const auto plain = [&] { do_nothing<<<lab.blocks, 32, 0, lab.stream>>>(args); };
  const auto extended = [&](int attributes) {
    config.numAttrs = attributes;
    LAB_CUDA(cudaLaunchKernelEx(&config, do_nothing, args));
  };
  host_variant(lab, "host: <<<>>>", plain);
  host_variant(lab, "host: cudaLaunchKernelEx", [&] { extended(0); });
  host_variant(lab, "host: cudaLaunchKernelEx with PDL", [&] {
    if (!lab.at_least(9)) throw Skipped("PDL needs sm_90");
    extended(1);
  });
  host_variant(lab, "host: cudaFuncSetAttribute and <<<>>>", [&] {
    LAB_CUDA(cudaFuncSetAttribute(do_nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024));
    plain();
  });
  host_variant(lab, "host: cudaStreamIsCapturing and <<<>>>", [&] {
    cudaStreamCaptureStatus status;
    LAB_CUDA(cudaStreamIsCapturing(lab.stream, &status));
    plain();
  });
  host_variant(lab, "host: cudaGetDevice, cudaGetLastError and <<<>>>", [&] {
    int device = 0;
    LAB_CUDA(cudaGetDevice(&device));
    plain();
    LAB_CUDA(cudaGetLastError());
  });
  host_variant(lab, "host: cudaMemsetAsync of 4 bytes", [&] { lab.failed->fill(0, lab.stream); });
  std::unique_ptr<Graph> graph;
  host_variant(lab, "host: a graph of one kernel", [&] {
    if (graph == nullptr) graph = std::make_unique<Graph>(lab.stream, plain);
    graph->replay();
  });
}

inline void topic_launch(Lab& lab) {
  pdl_variants(lab);
  meeting_variants(lab);
  two_streams_variants(lab);
  host_variants(lab);
}

}  // namespace gc::lab
