#include "cuda/kernels/statistics.h"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/launch.h"

namespace gc {

cudaError_t launch_statistics(const Plan& plan, StatisticsArgs args, cudaStream_t stream) {
  return dispatch<StatisticsTraits>(plan, [&](auto instance) {
    using I = decltype(instance);
    return launch(statistics<typename I::T, I::kLayout, I::kRows, I::kWidth>, plan, args, stream);
  });
}

}  // namespace gc
