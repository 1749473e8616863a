// Feature maps and small tensors as the bindings see them.
//
// A feature map keeps its layout: channels_last stays channels_last, anything that is neither that nor NCHW is copied
// to the nearer of the two.
#pragma once

#include <ATen/ATen.h>

#include "cpu/pages.h"
#include "cpu/plan.h"
#include "ops/checks.h"

namespace gc::cpu {

struct FeatureMap {
  at::Tensor tensor;
  at::MemoryFormat format;
  Shape shape;

  FeatureMap(const at::Tensor& x, const char* name) {
    check_feature_map(x, name);
    format = at::MemoryFormat::Contiguous;
    if (!x.is_contiguous()) format = x.suggest_memory_format();
    tensor = x.contiguous(format);
    // A single pixel is the same memory in both layouts, and a row of channels is the better one.
    const int64_t pixels = x.size(2) * x.size(3);
    const bool channels_last = format == at::MemoryFormat::ChannelsLast || pixels == 1;
    shape = {x.size(0), x.size(1), pixels, channels_last};
  }

  at::Tensor like() const { return empty_output(tensor.sizes(), tensor.options().memory_format(format)); }
  at::TensorOptions accumulation() const { return tensor.options().dtype(accumulation_type(tensor.scalar_type())); }
};

// Whether an output like x is written past the caches: with x and the gradients it would not stay there anyway, and a
// store that fetches its line first costs a third of the traffic. Measured on 2 cores of an AMD EPYC with 32 MiB of
// third-level cache, float32, reused pages, outputs of 12 to 25 MiB: 6 to 13 % gained, and 2 to 9 % with an in-place
// ReLU on the output and on grad_x included (7x7 NCHW, which was measured alone, left out).
inline bool past_caches(const FeatureMap& x) { return x.tensor.nbytes() >= 8 * 1024 * 1024; }

// For operators that read every element once and keep channels apart: the planes of an NCHW tensor may be grouped at
// will, and in small groups each plane streams as one long run.
inline Shape streaming(Shape shape) {
  if (shape.channels_last) return shape;
  const int64_t planes = shape.images * shape.channels;
  int64_t group = 16;
  while (planes % group != 0) group /= 2;
  return {planes / group, group, shape.pixels, false};
}

inline at::Tensor accumulated(const at::Tensor& companion, const FeatureMap& x) {
  return companion.to(accumulation_type(x.tensor.scalar_type())).contiguous();
}

}  // namespace gc::cpu
