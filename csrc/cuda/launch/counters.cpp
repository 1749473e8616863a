#include "cuda/launch/counters.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <optional>
#include <string>
#include <utility>

#include "cuda/launch/region_pool.h"

namespace gc::cuda {

namespace {

// While it lives, this thread may make calls that a capture in "global" mode, of this or any other thread, forbids:
// they would invalidate that capture. None of the calls below has anything to do with a stream that captures.
using CaptureMode = c10::cuda::CUDAStreamCaptureModeGuard;

// An event that is made when it is first recorded.
class Event {
 public:
  Event() = default;
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }

  cudaError_t record(cudaStream_t stream) {
    if (event_ == nullptr) {
      const cudaError_t status = cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
      if (status != cudaSuccess) return status;
    }
    return cudaEventRecord(event_, stream);
  }

  bool passed() const {
    const CaptureMode relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());  // which would be the next call's otherwise
      return false;
    }
    C10_CUDA_CHECK(status);
    return true;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// A stream for one fill, which waits for nobody's work.
struct FillStream {
  cudaStream_t stream = nullptr;
  ~FillStream() {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

struct DeviceMemory {
  using Mark = Event;

  // Memory for as long as the process lives. Not from torch's allocator: that one may be at the moment lending from
  // the pool of a CUDA graph, whose memory it takes back (torch.compile's warm-up runs do so without capturing).
  // Waits for the fill: the streams and graphs that will use it know nothing of it. That is once for 256 streams or
  // graphs, and for a launch that needs more than any before it.
  void* zeroed(int device, int64_t bytes) const {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    const CaptureMode relaxed(cudaStreamCaptureModeRelaxed);
    void* memory = nullptr;
    cudaError_t status = fill(&memory, bytes);
    if (status == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());  // which would be the next call's otherwise
      try {
        c10::cuda::CUDACachingAllocator::emptyCache();
      } catch (const c10::Error&) {
        // Some versions refuse while a graph is captured. Perhaps there is room by now nevertheless.
      }
      status = fill(&memory, bytes);
    }
    if (status == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      TORCH_CHECK_WITH(OutOfMemoryError, false,
                       "CUDA out of memory: gc_cuda needs " + std::to_string(bytes) + " bytes on GPU " +
                           std::to_string(device) + " for the counters of its kernels");
    }
    C10_CUDA_CHECK(status);
    return memory;
  }

  bool passed(const Mark& mark) const { return mark.passed(); }

 private:
  // The memory first: where there is none, no stream is made either.
  static cudaError_t fill(void** memory, int64_t bytes) {
    cudaError_t status = cudaMalloc(memory, bytes);
    if (status != cudaSuccess) return status;
    FillStream own;
    status = cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = cudaMemsetAsync(*memory, 0, bytes, own.stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(own.stream);
    if (status != cudaSuccess) cudaFree(*memory);
    return status;
  }
};

using Pool = RegionPool<DeviceMemory>;

Pool& pool() {
  static Pool& lasting = *new Pool;  // no destructor: CUDA may be gone by then, and graphs may be freed still later
  return lasting;
}

struct Capture {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
};

Capture capture_of(cudaStream_t stream) {
  Capture found;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &found.status, &found.id, &found.graph));
#elif CUDART_VERSION >= 12030
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream, &found.status, &found.id, &found.graph));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &found.status, &found.id, &found.graph));
#endif
  if (found.status == cudaStreamCaptureStatusInvalidated) C10_CUDA_CHECK(cudaErrorStreamCaptureInvalidated);
  return found;
}

// A number that no other stream of the device has or will have, if there is one for certain. A handle is not such a
// number: that of the per-thread default stream stands for one stream in each thread, and that of a stream which is
// destroyed is used again. CUDA has ids since version 12 (with version 11 all streams but the default one borrow), and
// refuses them while a stream captures, where none is needed.
std::optional<uint64_t> unique_id([[maybe_unused]] cudaStream_t stream) {
  constexpr uint64_t kDefaultStream = ~uint64_t{0};
  if (stream == nullptr || stream == cudaStreamLegacy) return kDefaultStream;
  if (stream == cudaStreamPerThread) return std::nullopt;
#if CUDART_VERSION >= 12000
  unsigned long long id = 0;
  if (cudaStreamGetId(stream, &id) == cudaSuccess) return id;
  static_cast<void>(cudaGetLastError());
#endif
  return std::nullopt;
}

// Called when nothing of a graph is left, on a thread of the runtime on which CUDA must not be called.
void CUDART_CB give_back(void* region) { pool().release(static_cast<Region*>(region)); }

// Has the graph hold a region: an executable graph holds all that its graph does, until its work is done, also if it is
// destroyed before; copies of a graph and graphs that contain it do the same.
bool retain(cudaGraph_t graph, Region* region) {
  cudaUserObject_t object = nullptr;
  if (cudaUserObjectCreate(&object, region, give_back, 1, cudaUserObjectNoDestructorSync) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    pool().release(region);
    return false;
  }
  if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) == cudaSuccess) return true;
  static_cast<void>(cudaGetLastError());
  cudaUserObjectRelease(object, 1);  // which calls give_back
  return false;
}

}  // namespace

struct Counters::OnLoan {
  Pool::Loan loan;
  cudaStream_t stream;
};

Counters::Counters(int64_t count, int device, cudaStream_t stream) {
  if (count == 0) return;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(unsigned));
  const Capture capture = capture_of(stream);
  if (capture.status == cudaStreamCaptureStatusActive) {
    void* slice =
        pool().of_capture(device, capture.id, bytes, [&](Region* region) { return retain(capture.graph, region); });
    if (slice == nullptr) {
      // A graph that takes no user object gets torch's memory and a node that fills it.
      const at::Device where(at::kCUDA, static_cast<c10::DeviceIndex>(device));
      filled_ = at::zeros({count}, at::TensorOptions().device(where).dtype(at::kInt));
      slice = filled_.data_ptr();
    }
    start_ = static_cast<unsigned*>(slice);
    return;
  }
  if (const std::optional<uint64_t> id = unique_id(stream)) {
    start_ = static_cast<unsigned*>(pool().of_stream(device, *id, bytes));
    if (start_ != nullptr) return;
  }
  loan_ = std::make_unique<OnLoan>(OnLoan{pool().borrow(device, bytes), stream});
  start_ = static_cast<unsigned*>(loan_->loan.region->start);
}

Counters::~Counters() {
  if (loan_ == nullptr) return;
  // If the end cannot be marked, nobody knows when the region is free again: then it is nobody's from now on.
  if (loan_->loan.mark.record(loan_->stream) == cudaSuccess) {
    pool().give_back(std::move(loan_->loan));
  } else {
    static_cast<void>(cudaGetLastError());
  }
}

}  // namespace gc::cuda
