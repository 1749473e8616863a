// What kernels must have come to, computed on the host.
#pragma once

#include <algorithm>
#include <vector>

#include "meet_kernels.h"

namespace gc::lab {

// What every block of an exchange must have at its end: [blocks, count].
inline std::vector<unsigned> expected_exchange(int blocks, int group, int count, int rounds) {
  std::vector<unsigned> out(static_cast<std::size_t>(blocks) * count);
  for (int begin = 0; begin < blocks; begin += group) {
    std::vector<unsigned> values(count), next(count);
    for (int i = 0; i < count; ++i) values[i] = first_value(begin / group, i);
    for (int round = 0; round < rounds; ++round) {
      for (int i = 0; i < count; ++i) next[i] = next_value(values[i], values[(i + 1) % count]);
      values.swap(next);
    }
    for (int b = begin; b < std::min(begin + group, blocks); ++b) {
      std::copy(values.begin(), values.end(), out.begin() + static_cast<std::size_t>(b) * count);
    }
  }
  return out;
}

// The state of every block after the rounds of scatter_cells.
inline std::vector<unsigned> expected_scatter(int blocks, int count, int rounds) {
  std::vector<unsigned> state(blocks), next(blocks);
  for (int b = 0; b < blocks; ++b) state[b] = random_word(b);
  for (int round = 1; round <= rounds; ++round) {
    for (int b = 0; b < blocks; ++b) {
      unsigned sum = 0;
      for (int c = count * b / blocks; c < count * (b + 1) / blocks; ++c) {
        for (int r = 0; r < blocks; ++r) sum += scattered_value(state[r], c, round);
      }
      next[b] = sum;
    }
    state.swap(next);
  }
  return state;
}

// The weighted sum of words, modulo 2^32, as the reading kernels have it over all their threads.
inline unsigned expected_sum(const std::vector<unsigned>& words) {
  unsigned sum = 0;
  for (std::size_t i = 0; i < words.size(); ++i) sum += words[i] * weight(static_cast<unsigned>(i));
  return sum;
}

}  // namespace gc::lab
