// Batch normalization as the passes of the residual tail see it: vectors of the channels in the accumulation type.
#pragma once

#include "cpu/scratch.h"

namespace gc::cpu {

// Taken only where there is a norm to be.
template <typename T>
struct NormMemory {
  using A = acc_t<T>;
  A *weight, *bias;  // copies
  A *slope, *full_bias;

  NormMemory(const FeatureMap& y, Scratch<A>& scratch, bool normalized = true) {
    const int64_t count = normalized ? y.channels() : 0;
    weight = take_copy<T>(scratch, count);
    bias = take_copy<T>(scratch, count);
    slope = scratch.take(count);
    full_bias = scratch.take(count);
  }
};

// x = slope (y - mean) + bias
template <typename T>
struct NormVectors {
  using A = acc_t<T>;
  const A *mean, *inverse_std, *slope, *bias;  // [C]

  NormVectors(const Norm& norm, int64_t channels, const NormMemory<T>& memory)
      : mean(static_cast<const A*>(norm.mean)),
        inverse_std(static_cast<const A*>(norm.inverse_std)),
        slope(inverse_std),
        bias(widen<T>(norm.bias, channels, memory.bias)) {
    if (const A* const weight = widen<T>(norm.weight, channels, memory.weight)) {
      for (int64_t c = 0; c < channels; ++c) memory.slope[c] = weight[c] * inverse_std[c];
      slope = memory.slope;
    }
    if (bias == nullptr) bias = std::fill_n(memory.full_bias, channels, A(0)) - channels;
  }
};

// The contexts of x from those of y - mean: slope * context + bias. Rows of states, of which the statistics stay.
template <typename T>
void normalize_contexts(const NormVectors<T>& norm, int64_t images, int64_t channels, const acc_t<T>* state,
                        acc_t<T>* of_x) {
  const int64_t row = channels + kStatistics;
  for (int64_t n = 0; n < images; ++n, state += row, of_x += row) {
    std::copy_n(state, kStatistics, of_x);
    for (int64_t c = 0; c < channels; ++c) {
      of_x[kStatistics + c] = norm.slope[c] * state[kStatistics + c] + norm.bias[c];
    }
  }
}

// A vector of the channels, once for each image.
template <typename A>
const A* for_each_image(const A* vector, int64_t images, int64_t channels, A* copies) {
  for (int64_t n = 0; n < images; ++n) std::copy_n(vector, channels, copies + n * channels);
  return copies;
}

// product[n, c] = rows[n, c] * vector[c]; rows that are null are 1.
template <typename A>
const A* times(const A* rows, const A* vector, int64_t images, int64_t channels, A* product) {
  if (rows == nullptr) return for_each_image(vector, images, channels, product);
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < channels; ++c) product[n * channels + c] = rows[n * channels + c] * vector[c];
  }
  return product;
}

}  // namespace gc::cpu
