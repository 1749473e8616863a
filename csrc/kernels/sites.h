// The barriers and fences of the kernels, by number. Dropping any of them (GC_DROP_SITE) must fail a test of
// tests/host; one that can go without a failure is redundant and goes.
#pragma once

namespace gc {

enum Site : int {
  kSyncStaged,        // pool_forward: the mask weights are in shared memory
  kSyncDot,           // pool_forward: every warp's part of the logits is in scratch
  kSyncPixelMax,      // pool_forward: every warp's largest logit is in scratch
  kSyncPixelSum,      // pool_forward: every warp's part of the sums over pixels is in scratch
  kSyncSplitWeights,  // pool_forward: the weight of every split is in shared memory
  kSyncGradStaged,    // pool_backward: grad_context, mask weights and the parts of gc . context are in shared memory
  kSyncGradDot,       // pool_backward: every warp's part of gc . x is in scratch
  kSyncWeightSum,     // pool_backward: every warp's part of the weight gradient is in scratch
  kSyncPixelDot,      // pixel_dot: every warp's part of the dot products is in scratch
  kSyncGradSum,       // broadcast_mul_backward: every warp's part of the sums over pixels is in scratch
  kSyncBeforeTicket,  // arrive_last: the whole block has written its partial results
  kSyncAfterTicket,   // arrive_last: the whole block knows whether it is the last
  kFenceRelease,      // arrive_last: partial results are visible before the ticket
  kFenceAcquire,      // arrive_last: the others' partial results are read after the ticket
  kSiteCount
};

}  // namespace gc
