// What the topics share on the host: the device, checked calls, memory, timing, and how a variant is run so that its
// failure stays its own. One worker process a topic.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>

#include "copy_kernels.h"
#include "expected.h"
#include "launch_kernels.h"
#include "workers.h"

namespace gc::lab {

// A CUDA call went wrong. The context may be lost, so the worker's process ends and another goes on after this variant.
class CudaError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw CudaError(std::string(cudaGetErrorName(error)) + " from " + call);
}
#define LAB_CUDA(call) ::gc::lab::check_cuda(call, #call)

// A variant gave wrong results or cannot be had here. The next one can go on.
class WrongResult : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
class Skipped : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void require(bool good, const std::string& what) {
  if (!good) throw WrongResult(what);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : count_(count) { LAB_CUDA(cudaMalloc(&data_, count * sizeof(T))); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* data() const { return data_; }
  std::size_t bytes() const { return count_ * sizeof(T); }
  void fill(int byte, cudaStream_t stream) { LAB_CUDA(cudaMemsetAsync(data_, byte, bytes(), stream)); }
  std::vector<T> read() const {
    std::vector<T> host(count_);
    LAB_CUDA(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  std::size_t count_;
  T* data_ = nullptr;
};

constexpr int kFullSharedBytes = kSlots * kTileBytes + 128;  // 208 KB and mbarriers: what a persistent block takes

class Lab {
 public:
  using Launch = std::function<void(int)>;  // of sample i

  // filter: a prefix of topic/variant; after: the name of the variant that a worker before us died in, or empty.
  Lab(std::string topic, std::string filter, std::string after, bool quick)
      : topic_(std::move(topic)), filter_(std::move(filter)), after_(std::move(after)), repeats(quick ? 20 : 30) {
    LAB_CUDA(cudaSetDevice(0));
    LAB_CUDA(cudaGetDeviceProperties(&device, 0));
    LAB_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    LAB_CUDA(cudaEventCreate(&begin_));
    LAB_CUDA(cudaEventCreate(&end_));
    blocks = device.multiProcessorCount;
    failed = std::make_unique<DeviceArray<unsigned>>(1);
    spans = std::make_unique<DeviceArray<Span>>(1 << 16);
    failed->fill(0, stream);
    warm_up();
    DeviceArray<U64> clocks(3);
    measure_clock<<<1, 32, 0, stream>>>(clocks.data(), 200 * 1000);
    LAB_CUDA(cudaGetLastError());
    LAB_CUDA(cudaStreamSynchronize(stream));
    timer_step_ns = clocks.read()[2];
  }

  // 640 MB of random words to read and as much to write: variants that are cold go through them in turn.
  void take_memory() {
    source = std::make_unique<DeviceArray<Vec16>>(kMemoryVectors);
    target = std::make_unique<DeviceArray<Vec16>>(kMemoryVectors);
    const int grid = kMemoryVectors / (kCopyThreads * kCopyBatch);
    write_random<<<grid, kCopyThreads, 0, stream>>>({source->data(), nullptr, kMemoryVectors});
    LAB_CUDA(cudaGetLastError());
    target->fill(0xff, stream);
    LAB_CUDA(cudaStreamSynchronize(stream));
  }

  // Where the i-th of the pieces of so many vectors begins; with enough of them that none is still in the cache when
  // its turn comes again.
  static long long piece(int i, long long vectors) {
    const long long pieces = std::min<long long>(kMemoryVectors / vectors, 64);
    require(pieces >= 2, "a piece is too large for the laboratory's memory");
    return i % pieces * vectors;
  }

  bool at_least(int major) const { return device.major >= major; }

  // A persistent kernel with so much dynamic shared memory.
  template <typename Kernel>
  void allow_shared(Kernel* kernel, int bytes) const {
    const auto limit = static_cast<int>(device.sharedMemPerBlockOptin);
    if (bytes > limit)
      throw Skipped("needs " + std::to_string(bytes) + " bytes of shared memory, has " + std::to_string(limit));
    LAB_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }

  // Runs a variant that fills in a row, unless it is filtered out, and reports the row.
  void variant(const std::string& name, const std::function<void(Row&)>& body) {
    if (!after_.empty()) {
      if (name == after_) after_.clear();
      return;
    }
    const std::string key = topic_ + "/" + name;
    if (key.rfind(filter_, 0) != 0 && filter_.rfind(topic_ + "/", 0) == 0) return;
    std::printf("begin\t%s\n", name.c_str());
    std::fflush(stdout);
    Row row;
    row.topic = topic_;
    row.name = name;
    bool lost = false;
    const auto fail = [&](const char* status, const char* what) {
      row.status = status;
      row.note = what;
      row.samples.clear();
    };
    try {
      body(row);
      LAB_CUDA(cudaGetLastError());
      LAB_CUDA(cudaDeviceSynchronize());
    } catch (const WrongResult& error) {
      fail("FAILED", error.what());
    } catch (const Skipped& error) {
      fail("skipped", error.what());
    } catch (const CudaError& error) {
      fail("FAILED", error.what());
      cudaGetLastError();  // forgets an error that is not sticky
      lost = cudaDeviceSynchronize() != cudaSuccess;
    }
    std::printf("row\t%s\n", to_line(row).c_str());
    std::fflush(stdout);
    if (lost) std::_Exit(kContextLost);  // the parent starts another worker after this variant
  }

  // --- timing: microseconds ---

  // Events around what `launch` does. hold_us > 0: behind a kernel that keeps the stream busy until all is queued, so
  // that the host's time is not in it; a sample for which the host was too slow is taken again behind a longer one.
  std::vector<double> by_events(const Launch& launch, unsigned hold_us, int samples = 0) {
    std::vector<double> times;
    const int count = samples > 0 ? samples : repeats;
    for (int i = -2; i < count; ++i) {
      if (hold_us > 0) hold_stream<<<1, 32, 0, stream>>>(hold_us * 1000);
      LAB_CUDA(cudaEventRecord(begin_, stream));
      launch(i + 2);
      LAB_CUDA(cudaEventRecord(end_, stream));
      const bool late = cudaEventQuery(begin_) == cudaSuccess;
      if (!late) cudaGetLastError();  // "not ready" is what we want
      LAB_CUDA(cudaStreamSynchronize(stream));
      LAB_CUDA(cudaGetLastError());
      if (hold_us > 0 && late && hold_us < kLongestHoldUs) {
        hold_us *= 2;
        --i;
        continue;
      }
      float ms = 0;
      LAB_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 0) times.push_back(ms * 1e3);
    }
    require_no_timeout();
    return times;
  }

  // From the first block's begin to the last one's end, as the kernel's blocks note them in spans. Where the global
  // timer's steps are too long for that: the longest block, by the cycles of its multiprocessor.
  std::vector<double> by_spans(const Launch& launch, int span_blocks) {
    std::vector<double> times, longest;
    double nanoseconds = 0, cycles = 0;
    for (int i = -2; i < repeats; ++i) {
      launch(i + 2);
      LAB_CUDA(cudaGetLastError());
      LAB_CUDA(cudaStreamSynchronize(stream));
      U64 first = ~0ull, last = 0, most = 0;
      for (const Span& span : read_spans(span_blocks)) {
        first = std::min(first, span.begin), last = std::max(last, span.end), most = std::max(most, span.cycles);
        nanoseconds += span.end - span.begin, cycles += span.cycles;
      }
      if (i < 0) continue;
      times.push_back((last - first) * 1e-3);
      longest.push_back(most * 1e-3);
    }
    require_no_timeout();
    require(nanoseconds > 0 && cycles > 0, "the timers stand still");
    for (double& one : longest) one *= nanoseconds / cycles;
    return timer_step_ns > kFineTimerNs ? longest : times;
  }

  // What each further piece costs: (time of `many` - time of `few`) / (many - few), sample by sample.
  std::vector<double> by_slope(const std::function<void(int sample, int pieces)>& launch, int few, int many,
                               unsigned hold_us = 200) {
    const std::vector<double> low = by_events([&](int i) { launch(i, few); }, hold_us);
    const std::vector<double> high = by_events([&](int i) { launch(i, many); }, hold_us);
    std::vector<double> slopes;
    for (std::size_t i = 0; i < low.size(); ++i) slopes.push_back((high[i] - low[i]) / (many - few));
    return slopes;
  }

  std::vector<Span> read_spans(int count) const {
    std::vector<Span> host(count);
    LAB_CUDA(cudaMemcpy(host.data(), spans->data(), count * sizeof(Span), cudaMemcpyDeviceToHost));
    return host;
  }

  void require_no_timeout() {
    unsigned gave_up = 0;
    LAB_CUDA(cudaMemcpy(&gave_up, failed->data(), sizeof(gave_up), cudaMemcpyDeviceToHost));
    if (gave_up == 0) return;
    LAB_CUDA(cudaMemset(failed->data(), 0, sizeof(gave_up)));
    LAB_CUDA(cudaDeviceSynchronize());
    throw WrongResult("a wait in the kernel gave up");
  }

  // --- checks ---

  // Bitwise equality of two ranges of device memory, in vectors. What is compared must not be constant: random words.
  void require_same(const Vec16* wanted, const Vec16* found, long long vectors, const std::string& what) {
    const std::size_t bytes = vectors * sizeof(Vec16);
    left_.resize(bytes);
    right_.resize(bytes);
    LAB_CUDA(cudaStreamSynchronize(stream));
    LAB_CUDA(cudaMemcpy(left_.data(), wanted, bytes, cudaMemcpyDeviceToHost));
    LAB_CUDA(cudaMemcpy(right_.data(), found, bytes, cudaMemcpyDeviceToHost));
    require_no_timeout();
    require(std::memcmp(left_.data(), right_.data(), bytes) == 0, what + ": the copy differs");
  }

  void poison(Vec16* memory, long long vectors) {
    LAB_CUDA(cudaMemsetAsync(memory, 0xff, vectors * sizeof(Vec16), stream));
  }

  // The weighted sum of words, modulo 2^32, as the kernels have it.
  unsigned weighed_sum(const Vec16* memory, long long vectors) {
    std::vector<unsigned> words(vectors * 4);
    LAB_CUDA(cudaMemcpy(words.data(), memory, words.size() * 4, cudaMemcpyDeviceToHost));
    return expected_sum(words);
  }

  void require_sum(const unsigned* sums, int count, unsigned wanted, const std::string& what) {
    std::vector<unsigned> host(count);
    LAB_CUDA(cudaStreamSynchronize(stream));
    LAB_CUDA(cudaMemcpy(host.data(), sums, count * sizeof(unsigned), cudaMemcpyDeviceToHost));
    require_no_timeout();
    unsigned sum = 0;
    for (const unsigned one : host) sum += one;
    require(sum == wanted, what + ": the sum differs");
  }

  static constexpr unsigned kLongestHoldUs = 8000;
  static constexpr int kMemoryVectors = 640 * 1024 * 1024 / 16;

  cudaDeviceProp device{};
  cudaStream_t stream = nullptr;
  int blocks = 0;  // one a multiprocessor
  U64 timer_step_ns = 0;
  static constexpr U64 kFineTimerNs = 100;
  std::unique_ptr<DeviceArray<Vec16>> source, target;
  std::unique_ptr<DeviceArray<unsigned>> failed;
  std::unique_ptr<DeviceArray<Span>> spans;

 private:
  // Clocks rise under load.
  void warm_up() {
    for (int i = 0; i < 20; ++i) hold_stream<<<blocks, 32, 0, stream>>>(5u * 1000 * 1000);
    LAB_CUDA(cudaGetLastError());
    LAB_CUDA(cudaStreamSynchronize(stream));
  }

  std::string topic_, filter_, after_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::vector<unsigned char> left_, right_;

 public:
  const int repeats;
};

// A graph of what `record` puts into the stream.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& record) : stream_(stream) {
    cudaGraph_t graph = nullptr;
    LAB_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    record();
    LAB_CUDA(cudaStreamEndCapture(stream, &graph));
    const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check_cuda(error, "cudaGraphInstantiate");
    LAB_CUDA(cudaGraphUpload(exec_, stream));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(exec_); }
  void replay() const { LAB_CUDA(cudaGraphLaunch(exec_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace gc::lab
