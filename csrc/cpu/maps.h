// How the CPU sees a feature map: the shape in memory, how its passes are cut, and where what they write goes.
#pragma once

#include "cpu/plan.h"
#include "ops/map.h"

namespace gc::cpu {

// A single pixel is the same memory in both layouts, and a row of channels is the better one.
inline Shape shape_of(const FeatureMap& x) {
  return {x.images(), x.channels(), x.pixels(), x.channels_last() || x.pixels() == 1};
}

// For passes that read every element once and keep channels apart: the planes of an NCHW tensor may be grouped at will,
// and in small groups each plane streams as one long run.
inline Shape streaming(Shape shape) {
  if (shape.channels_last) return shape;
  const int64_t planes = shape.images * shape.channels;
  int64_t group = 16;
  while (planes % group != 0) group /= 2;
  return {planes / group, group, shape.pixels, false};
}

inline Plan plan_for(const FeatureMap& x, const Shape& shape) { return make_plan(shape, x.tensor().element_size()); }

// Whether an output like x is written past the caches: with x and the gradients it would not stay there anyway, and a
// store that fetches its line first costs a third of the traffic. Measured on 2 cores of an AMD EPYC with 32 MiB of
// third-level cache, float32, reused pages, outputs of 12 to 25 MiB: 6 to 13 % gained, and 2 to 9 % with an in-place
// ReLU on the output and on grad_x included (7x7 NCHW, which was measured alone, left out).
inline bool past_caches(const FeatureMap& x) { return x.tensor().nbytes() >= 8 * 1024 * 1024; }

}  // namespace gc::cpu
