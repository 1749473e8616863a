// The barriers, fences and waits of the kernels, by number. Dropping any of them (GC_DROP_SITE) must fail a test of
// tests/host; one that can go without a failure is redundant and goes.
#pragma once

namespace gc {

enum Site : int {
  kSyncStaged,         // pool_forward: the mask weights are in shared memory
  kSyncDot,            // pool_forward: every warp's values of the logits is in scratch
  kSyncPixelMax,       // pool_forward: every warp's largest logit is in scratch
  kSyncPixelSum,       // pool_forward: every warp's values of the sums over pixels is in scratch
  kSyncSplitStats,     // pool_forward: the largest logit and the sum of every split are in shared memory
  kSyncSplitWeights,   // pool_forward: the weight of every split is in shared memory
  kAwaitTile,          // pool_forward: the tile is in shared memory
  kSyncGradStaged,     // pool_backward: grad_context, context, mask weights and scale are in shared memory
  kSyncGradDot,        // pool_backward: every warp's values of gc . (x - context) is in scratch
  kAwaitGrad,          // pool_backward: the tile's rows of grad are in shared memory
  kSyncWeightSum,      // pool_backward: every warp's values of the weight gradient is in scratch
  kSyncPixelDot,       // pixel_dot: every warp's values of the dot products is in scratch
  kSyncCentre,         // statistics: every warp's sums of the first tile are in scratch
  kSyncMoments,        // statistics: every warp's sums over pixels are in scratch
  kSyncGradSum,        // broadcast_mul_backward: every warp's values of the sums over pixels is in scratch
  kSyncResidualSum,    // residual_sums: the same
  kSyncBeforeTicket,   // arrive_last: the whole block has written its partial results
  kSyncAfterTicket,    // arrive_last: the whole block knows whether it is the last
  kFenceRelease,       // arrive_last: partial results are visible before the ticket
  kFenceAcquire,       // arrive_last: the others' partial results are read after the ticket
  kSyncPhaseTicket,    // Phase: the block knows its ticket
  kSyncPhaseBegins,    // Phase: the block knows that the phase before is done
  kSyncPhaseEnds,      // Phase: the whole block has written what the next phase reads
  kFencePhaseRelease,  // Phase: a block's results are visible before it counts as finished
  kFencePhaseAcquire,  // Phase: the results of the phase before are read after its end
  kFencePhaseReset,    // Phase: the counters are used no more when they are put back to 0
  kSyncMergeShares,    // late_merge: every warp's share of an image's partial results is in shared memory
  kSyncMergeDone,      // late_merge: nobody reads it any more
  kSyncTileShares,     // transform_forward: every warp's share of the dot products is in shared memory
  kSyncHiddenReady,    // transform_forward: the hidden units of these images are in shared memory
  kSyncHiddenDone,     // transform_forward: nobody reads them any more
  kSyncSlabStaged,     // transform_backward: the gradients of these images and rows are in shared memory
  kSyncSlabSums,       // transform_backward: every warp's part of the sums over rows is in shared memory
  kSyncImageSums,      // transform_backward: every adder's part of the sums over images is in shared memory
  kSyncNormParts,      // transform_backward: the sums over ranges of slabs are in shared memory
  kSyncNormSums,       // transform_backward: every warp's part of the norm's sums is in shared memory
  // In a launch that begins early, what the launches before have written is complete, in
  kWaitBroadcast,
  kWaitBroadcastFlat,
  kWaitPoolBackward,
  kWaitTransformForward,
  kWaitTransformBackward,
  kWaitResidual,
  kWaitResidualFlat,
  kSiteCount
};

}  // namespace gc
