// Sums whose rounding error hardly grows with the number of terms: after kChain additions a sum moves up one level,
// where kChain such sums are added before their sum moves up in turn. A term meets about kChain roundings on each
// level; in a single chain it would meet as many as there are terms.
#pragma once

#include "cpu/simd/lanes.h"

namespace gc::cpu {
inline namespace CPU_CAPABILITY {

inline constexpr int64_t kChain = 32;  // additions into one sum before it is added to one of the next level
inline constexpr int kLevels = 4;      // of sums; the last one's chain is as long as it must be beyond 32^4 terms

// Calls move(level) for each level whose sum is complete after `terms` terms, from 0 on: add it to the next, clear it.
template <typename Move>
inline void move_up(int64_t terms, const Move& move) {
  for (int level = 0; level < kLevels - 1 && terms % kChain == 0; ++level, terms /= kChain) move(level);
}

// A sum of numbers or vectors, few enough to stay at hand.
template <typename Sum>
class Cascade {
 public:
  void add(const Sum& term) {
    levels_[0] += term;
    move_up(++terms_, [&](int level) {
      levels_[level + 1] += levels_[level];
      levels_[level] = Sum(0);
    });
  }

  Sum total() const {
    Sum total = levels_[0];
    for (int level = 1; level < kLevels && terms_ >= kChain; ++level) total += levels_[level];
    return total;
  }

 private:
  Sum levels_[kLevels] = {Sum(0), Sum(0), Sum(0), Sum(0)};
  int64_t terms_ = 0;
};

// `width` sums in memory. It does not store them in a std::vector, which would be one class for all instruction sets.
template <typename A>
class Sums {
 public:
  explicit Sums(int64_t width) : width_(width) {}
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;
  ~Sums() { delete[] upper_; }

  // Begins new sums. The caller adds terms to out[0 .. width), where finish() leaves the sums.
  void start(A* out) {
    out_ = out;
    terms_ = 0;
    clear(0);
  }

  // The caller has added one term to each number of `out`.
  void added() {
    if (++terms_ == kChain) prepare_upper();
    move_up(terms_, [&](int from) {
      add(level(from), level(from + 1));
      clear(from);
    });
  }

  // Multiplies what has been added so far.
  void scale(A factor) {
    for (int k = 0; k < used(); ++k) {
      for (int64_t i = 0; i < width_; ++i) level(k)[i] *= factor;
    }
  }

  void finish() {
    for (int k = 1; k < used(); ++k) add(level(k), out_);
  }

 private:
  A* level(int k) const { return k == 0 ? out_ : upper_ + (k - 1) * width_; }
  int used() const { return terms_ >= kChain ? kLevels : (terms_ > 0 ? 1 : 0); }

  // Sums of few terms, as those of a small map are, need nothing but `out`.
  void prepare_upper() {
    if (!upper_) upper_ = new A[(kLevels - 1) * width_];
    for (int k = 1; k < kLevels; ++k) clear(k);
  }

  void add(const A* from, A* to) const {
    for (int64_t i = 0; i < width_; ++i) to[i] += from[i];
  }
  void clear(int k) const {
    for (int64_t i = 0; i < width_; ++i) level(k)[i] = A(0);
  }

  int64_t width_;
  int64_t terms_ = 0;
  A* out_ = nullptr;
  A* upper_ = nullptr;
};

}  // namespace CPU_CAPABILITY
}  // namespace gc::cpu
