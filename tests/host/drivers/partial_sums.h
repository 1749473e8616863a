// Partial sums of splits, as the launch before the transform leaves them, and their sum as split_merge.h makes it.
#pragma once

#include <vector>

#include "feature_map.h"

namespace gc::drivers {

// As add_partials adds: fours of values to each other first.
template <typename A>
A sum_in_fours(const std::vector<A>& values) {
  A sum = 0;
  std::size_t k = 0;
  for (; k + 4 <= values.size(); k += 4) sum += values[k] + values[k + 1] + values[k + 2] + values[k + 3];
  for (; k < values.size(); ++k) sum += values[k];
  return sum;
}

// And as merge_partials does in two rounds, where the plans' groups have at least 8 partial results.
template <typename A>
A sum_in_rounds(const std::vector<A>& values) {
  std::size_t group = 8;
  while (group * group < values.size()) ++group;
  std::vector<A> groups;
  for (std::size_t k = 0; k < values.size(); k += group) {
    const std::size_t end = std::min(k + group, values.size());
    groups.push_back(sum_in_fours(std::vector<A>(values.begin() + k, values.begin() + end)));
  }
  return sum_in_fours(groups);
}

// Of gradients: [N, splits, C].
template <typename T>
struct PartialSums {
  using A = Acc<T>;

  int images, splits, channels;
  Buffer<A> buffer;

  PartialSums(const std::string& name, int images_, int splits_, int channels_)
      : images(images_),
        splits(splits_),
        channels(channels_),
        buffer(name, static_cast<std::size_t>(images_) * splits_ * channels_, Use::kInput) {
    Numbers numbers(static_cast<unsigned>(14 + name.front()));  // others for each branch
    for (std::size_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<A>(numbers(1));
  }

  // Of image and channel i = n * C + c.
  A sum(std::size_t i) const {
    std::vector<A> values;
    for (int k = 0; k < splits; ++k) values.push_back(buffer[(i / channels * splits + k) * channels + i % channels]);
    return sum_in_rounds(values);
  }
};

}  // namespace gc::drivers
