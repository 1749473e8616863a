// The counters of launches, with a CUDA runtime of this file in place of the real one.
#include "cuda/launch/counters.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#include "check.h"

namespace {

thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

// What the runtime is asked to do wrong, and what it has seen.
struct Runtime {
  int failing_requests = 0;  // that many requests fail
  bool creates_objects = true, retains_objects = true, has_ids = true, work_is_done = false;
  bool empty_cache_throws = false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;

  int allocations = 0, empty_caches = 0, streams = 0, events = 0, queries = 0;
  cudaError_t last = cudaSuccess;
  std::vector<std::pair<void*, cudaHostFn_t>> graph;  // the user objects that the graph holds
  std::vector<void*> memory;
} runtime;

cudaError_t failed(cudaError_t status) { return runtime.last = status; }

bool relaxed() { return mode == cudaStreamCaptureModeRelaxed; }

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }
const cudaStream_t kFill = stream_of(7);
const cudaGraph_t kGraph = reinterpret_cast<cudaGraph_t>(uintptr_t{9});

}  // namespace

void c10::cuda::CUDACachingAllocator::emptyCache() {
  REQUIRE(relaxed());
  ++runtime.empty_caches;
  if (runtime.empty_cache_throws) throw c10::Error("a graph is captured");
}

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(*other, mode);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(runtime.last, cudaSuccess); }

cudaError_t cudaMalloc(void** start, size_t bytes) {
  REQUIRE(relaxed());
  if (runtime.failing_requests > 0) {
    --runtime.failing_requests;
    return failed(cudaErrorMemoryAllocation);
  }
  ++runtime.allocations;
  *start = std::aligned_alloc(256, bytes);
  std::memset(*start, 0xFF, bytes);
  runtime.memory.push_back(*start);
  return cudaSuccess;
}
cudaError_t cudaFree(void*) {
  REQUIRE(false);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t stream) {
  REQUIRE(stream == kFill);
  std::memset(start, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  REQUIRE(relaxed() && flags == cudaStreamNonBlocking);
  *stream = kFill;
  ++runtime.streams;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  REQUIRE(stream == kFill);
  --runtime.streams;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  REQUIRE(relaxed() && stream == kFill);  // and never one of the caller's
  return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
#elif CUDART_VERSION >= 12030
cudaError_t cudaStreamGetCaptureInfo_v3(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                        cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                        size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                        cudaGraph_t* graph, const cudaGraphNode_t**, size_t*) {
#endif
  *status = runtime.status;
  *id = runtime.capture;
  *graph = kGraph;
  return cudaSuccess;
}
#if CUDART_VERSION >= 12000
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  REQUIRE(runtime.status == cudaStreamCaptureStatusNone);  // the driver refuses it for a stream that captures
  if (!runtime.has_ids) return failed(cudaErrorInvalidValue);
  *id = reinterpret_cast<uintptr_t>(stream) + 1000;
  return cudaSuccess;
}
#endif

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* payload, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags) {
  REQUIRE(count == 1 && flags == cudaUserObjectNoDestructorSync);
  if (!runtime.creates_objects) return failed(cudaErrorInvalidValue);
  *object = reinterpret_cast<cudaUserObject_t>(new std::pair<void*, cudaHostFn_t>(payload, destroy));
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  REQUIRE(count == 1);
  auto* const one = reinterpret_cast<std::pair<void*, cudaHostFn_t>*>(object);
  one->second(one->first);
  delete one;
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
  REQUIRE(graph == kGraph && count == 1 && flags == cudaGraphUserObjectMove);
  if (!runtime.retains_objects) return failed(cudaErrorInvalidValue);
  auto* const one = reinterpret_cast<std::pair<void*, cudaHostFn_t>*>(object);
  runtime.graph.push_back(*one);
  delete one;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  REQUIRE(flags == cudaEventDisableTiming);
  *event = reinterpret_cast<cudaEvent_t>(uintptr_t{1} + ++runtime.events);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
  REQUIRE(false);  // they are kept with the regions
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  REQUIRE(event != nullptr);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  REQUIRE(relaxed() && event != nullptr);
  ++runtime.queries;
  return runtime.work_is_done ? cudaSuccess : failed(cudaErrorNotReady);
}

}  // extern "C"

namespace gc::units {
namespace {

using cuda::Counters;

// Used by a launch on this stream; says where they are.
unsigned* use(cudaStream_t stream, int64_t count = 10) {
  const Counters counters(count, 0, stream);
  REQUIRE(std::all_of(counters.get(), counters.get() + count, [](unsigned one) { return one == 0; }));
  REQUIRE(runtime.last == cudaSuccess);  // which would be the error of the launch
  REQUIRE(mode == cudaStreamCaptureModeGlobal);
  REQUIRE(runtime.streams == 0);
  return counters.get();
}

template <typename Thrown>
std::string message(const std::function<void()>& call) {
  try {
    call();
  } catch (const Thrown& error) {
    return error.what();
  }
  return "";
}

void destroy_graph() {
  for (const auto& [payload, destroy] : runtime.graph) destroy(payload);
  runtime.graph.clear();
}

void no_counters_need_nothing() {
  REQUIRE(Counters(0, 0, nullptr).get() == nullptr);
  REQUIRE(runtime.allocations == 0);
}

void lack_of_memory_is_an_error_of_its_own() {
  for (const bool throws : {false, true}) {
    runtime.empty_cache_throws = throws;
    runtime.failing_requests = 2;
    const std::string said = message<c10::OutOfMemoryError>([] { Counters(10, 0, nullptr); });
    REQUIRE(said.find("GPU 0") != std::string::npos && said.find("counters") != std::string::npos);
    REQUIRE(runtime.last == cudaSuccess && mode == cudaStreamCaptureModeGlobal && runtime.streams == 0);
  }
  runtime.failing_requests = 1;  // there is some once torch has given back what it keeps
  use(nullptr);
  REQUIRE(runtime.empty_caches == 3 && runtime.allocations == 1);
}

void a_stream_keeps_its_counters() {
  unsigned* const first = use(nullptr);
  REQUIRE(use(nullptr) == first && use(cudaStreamLegacy) == first);
  unsigned* const second = use(stream_of(0x100));
  REQUIRE(second != first);
#if CUDART_VERSION >= 12000
  REQUIRE(use(stream_of(0x100)) == second);
  REQUIRE(use(stream_of(0x200)) != second);
  REQUIRE(runtime.events == 0);
#endif
}

// The per-thread default stream, and streams without an id.
void others_borrow() {
  const auto borrowing = [](cudaStream_t stream) {
    runtime.work_is_done = false;
    std::set<unsigned*> used;
    for (int i = 0; i < 5; ++i) REQUIRE(used.insert(use(stream)).second);
    const int before = runtime.events;
    runtime.work_is_done = true;
    for (int i = 0; i < 20; ++i) use(stream);
    REQUIRE(runtime.events == before);
    REQUIRE(runtime.queries > 0);
  };
  borrowing(cudaStreamPerThread);
  runtime.has_ids = false;
  borrowing(stream_of(0x100));
  runtime.has_ids = true;
}

void a_capture_gets_slices_and_no_fill() {
  runtime.status = cudaStreamCaptureStatusActive;
  runtime.capture = 1;
  std::set<unsigned*> slices;
  for (int i = 0; i < 40; ++i) REQUIRE(slices.insert(use(stream_of(0x100 + i % 2))).second);
  REQUIRE(runtime.graph.size() == 2);  // 32 slices in a region
  use(stream_of(0x100), 2000);
  REQUIRE(runtime.graph.size() == 3);
  const int before = runtime.allocations;
  for (runtime.capture = 2; runtime.capture < 100; ++runtime.capture) {
    destroy_graph();
    use(stream_of(0x100), 2000);
    for (int i = 0; i < 40; ++i) use(stream_of(0x100));
  }
  REQUIRE(runtime.allocations == before);
  destroy_graph();
  runtime.status = cudaStreamCaptureStatusNone;
}

void a_graph_that_takes_no_objects_has_fills() {
  runtime.status = cudaStreamCaptureStatusActive;
  const int before = runtime.allocations;
  for (bool* const works : {&runtime.creates_objects, &runtime.retains_objects}) {
    *works = false;
    ++runtime.capture;
    for (int i = 0; i < 1000; ++i) use(stream_of(0x100));
    REQUIRE(runtime.graph.empty());
    *works = true;
  }
  REQUIRE(runtime.allocations == before);  // the regions went back
  runtime.status = cudaStreamCaptureStatusNone;
}

void an_invalid_capture_is_named() {
  runtime.status = cudaStreamCaptureStatusInvalidated;
  REQUIRE(message<c10::Error>([] { use(stream_of(0x100)); }) == std::to_string(cudaErrorStreamCaptureInvalidated));
  runtime.status = cudaStreamCaptureStatusNone;
}

}  // namespace
}  // namespace gc::units

int main() {
  using namespace gc::units;
  no_counters_need_nothing();
  lack_of_memory_is_an_error_of_its_own();
  a_stream_keeps_its_counters();
  others_borrow();
  a_capture_gets_slices_and_no_fill();
  a_graph_that_takes_no_objects_has_fills();
  an_invalid_capture_is_named();
  for (void* const block : runtime.memory) std::free(block);
  std::puts("all cases passed");
}
