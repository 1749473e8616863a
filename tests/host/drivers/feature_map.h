// What the drivers of the kernels share: element types and their rounding, feature maps in either layout, small vectors
// in the element or the accumulation type, launches as the binding makes them, and the error that a correct kernel may
// make.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cases.h"
#include "cuda/kernels/numeric.h"
#include "cuda/launch/launch.h"
#include "cuda/plan/plan.h"
#include "launch_file.h"
#include "memory.h"

namespace gc::drivers {

using host::Buffer;
using host::Use;

template <typename T>
struct Element;
template <>
struct Element<float> {
  static constexpr ElementType type = ElementType::kFloat;
  static constexpr const char* name = "float32";
  static constexpr double roundoff = 0x1p-24, least = 0x1p-149;
};
template <>
struct Element<__half> {
  static constexpr ElementType type = ElementType::kHalf;
  static constexpr const char* name = "float16";
  static constexpr double roundoff = 0x1p-11, least = 0x1p-24;
};
template <>
struct Element<__nv_bfloat16> {
  static constexpr ElementType type = ElementType::kBFloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double roundoff = 0x1p-8, least = 0x1p-133;
};
template <>
struct Element<double> {
  static constexpr ElementType type = ElementType::kDouble;
  static constexpr const char* name = "float64";
  static constexpr double roundoff = 0x1p-53, least = 0x1p-1074;
};

template <typename T>
T rounded(double value) {
  return from_acc<T>(static_cast<Acc<T>>(value));
}

// Error of a sum of n terms in the accumulation type, relative to the sum of their magnitudes. Rounding errors of
// partial sums are as often up as down, so they grow with the root of n; 8 of them at the least.
template <typename T>
double sum_error(double n) {
  return Element<Acc<T>>::roundoff * (8 + 2 * std::sqrt(n));
}

// Error of storing a value as T.
template <typename T>
double store_error(double value) {
  return Element<T>::roundoff * std::abs(value) + Element<T>::least;
}

struct Shape {
  int images, channels, pixels;

  std::size_t elements() const { return static_cast<std::size_t>(images) * channels * pixels; }
  std::string to_string() const {
    return std::to_string(images) + "x" + std::to_string(channels) + "x" + std::to_string(pixels);
  }
};

// Numbers between -scale and scale, the same ones for the same seed.
class Numbers {
 public:
  explicit Numbers(unsigned seed) : random_(seed) {}
  double operator()(double scale = 1) { return scale * (random_() * 0x1p-31 - 1); }

 private:
  std::mt19937 random_;
};

// [N, C, S] or [N, S, C] in global memory.
template <typename T>
class FeatureMap {
 public:
  FeatureMap(const std::string& name, Shape shape, Layout layout, Use use, int misaligned = 0)
      : shape_(shape), layout_(layout), buffer_(name, shape.elements(), use, misaligned) {}

  void fill(Numbers& numbers, double scale) {
    for (std::size_t i = 0; i < buffer_.size(); ++i) buffer_[i] = rounded<T>(numbers(scale) + scale / 4);
  }
  void set(int n, int c, int s, double value) { buffer_[index(n, c, s)] = rounded<T>(value); }
  double operator()(int n, int c, int s) const { return to_acc(buffer_[index(n, c, s)]); }

  Buffer<T>& buffer() { return buffer_; }
  const Buffer<T>& buffer() const { return buffer_; }

 private:
  std::size_t index(int n, int c, int s) const {
    const std::size_t image = static_cast<std::size_t>(n) * shape_.channels * shape_.pixels;
    return image + (layout_ == Layout::kNCHW ? c * shape_.pixels + s : s * shape_.channels + c);
  }

  Shape shape_;
  Layout layout_;
  Buffer<T> buffer_;
};

// A small vector in T, or in its accumulation type if `wide`.
template <typename T>
class SmallVector {
 public:
  SmallVector(const std::string& name, std::size_t count, bool wide, Use use, int misaligned = 0)
      : wide_(wide), count_(count) {
    if (wide) {
      of_acc_ = std::make_unique<Buffer<Acc<T>>>(name, count, use, misaligned);
    } else {
      of_type_ = std::make_unique<Buffer<T>>(name, count, use, misaligned);
    }
  }

  void fill(Numbers& numbers, double scale) {
    for (std::size_t i = 0; i < count_; ++i) set(i, numbers(scale));
  }
  void set(std::size_t i, double value) {
    if (wide_) {
      (*of_acc_)[i] = static_cast<Acc<T>>(value);
    } else {
      (*of_type_)[i] = rounded<T>(value);
    }
  }
  double operator[](std::size_t i) const { return wide_ ? (*of_acc_)[i] : to_acc((*of_type_)[i]); }
  // Error of storing a value in it.
  double store_error(double value) const {
    return wide_ ? drivers::store_error<Acc<T>>(value) : drivers::store_error<T>(value);
  }

  // Calls body(buffer) with what holds the elements.
  template <typename Body>
  void with_buffer(const Body& body) const {
    wide_ ? body(*of_acc_) : body(*of_type_);
  }

  Companion companion() const { return {data(), wide_}; }
  CompanionOut out() { return {const_cast<void*>(data()), wide_}; }

 private:
  const void* data() const { return wide_ ? static_cast<const void*>(of_acc_->data()) : of_type_->data(); }

  bool wide_;
  std::size_t count_;
  std::unique_ptr<Buffer<T>> of_type_;
  std::unique_ptr<Buffer<Acc<T>>> of_acc_;
};

// The counters of a launch: 0 before it, and 0 after it.
class Tickets {
 public:
  explicit Tickets(const Plan& plan) : buffer_("tickets", std::vector<unsigned>(plan.tickets, 0), Use::kState) {}
  unsigned* data() { return buffer_.data(); }
  void check() const {
    for (std::size_t i = 0; i < buffer_.size(); ++i) host::require(buffer_[i] == 0, "tickets are 0 after a launch");
  }

 private:
  Buffer<unsigned> buffer_;
};

// Of the random schedules: launches that can begin early do so. Under every schedule a case must give the same bits.
inline Paths paths_under(const host::Schedule& schedule) {
  return schedule.order == host::Order::kRandom ? Paths(Path::kEarlyStart) : Paths{};
}

// A plan for a small device, so that small feature maps are split. The alignment is what misaligned elements leave.
template <typename T>
Plan plan_for(KernelKind kind, Shape shape, Layout layout, int multiprocessors, bool dots_given = false,
              int misaligned = 0, Paths paths = {}) {
  Problem problem{shape.images, shape.channels, shape.pixels, layout, Element<T>::type};
  while (misaligned * static_cast<int>(sizeof(T)) % problem.alignment != 0) problem.alignment /= 2;
  const int shared_bytes = paths.without(Path::kEarlyStart) == Paths{} ? host::kMaxSharedOptIn : host::kMostSharedOptIn;
  return make_plan(kind, problem, {multiprocessors, shared_bytes, paths}, dots_given);
}

// "", or "+full_machine": what newer ways add to the name of a case.
inline std::string suffix_of(Paths paths) { return paths == Paths{} ? "" : "+" + names_of(paths); }

// Runs a launch and checks what every launch must fulfil.
template <typename AnyPlan>
void run_launch(const AnyPlan& plan, const host::Schedule& schedule, const std::function<cudaError_t()>& launch) {
  host::LaunchFiles::schedule = schedule;
  try {
    host::require(launch() == cudaSuccess, "the launch returned an error");
  } catch (const host::LaunchError& error) {
    throw host::LaunchError(std::string(error.what()) + "\n  " + plan.to_string());
  }
  const bool early = plan.paths.has(Path::kEarlyStart) && !host::LaunchFiles::refuse_early;
  host::require(host::LaunchFiles::last.early == early, "the launch begins early, or not, against " + plan.to_string());
  host::require(host::LaunchFiles::last.shared_bytes == plan.shared_bytes,
                "a block took " + std::to_string(host::LaunchFiles::last.shared_bytes) +
                    " bytes of shared memory, planned: " + plan.to_string());
}

// Every run of a case must give the same bits, whatever the schedule and the addresses.
class SameBits {
 public:
  template <typename T>
  void check(const Buffer<T>& buffer) {
    std::vector<unsigned char> bytes(buffer.bytes());
    std::memcpy(bytes.data(), buffer.data(), bytes.size());
    for (const auto& [name, first] : seen_) {
      if (name == buffer.name()) return host::require(first == bytes, name + " differs from that of another run");
    }
    seen_.emplace_back(buffer.name(), std::move(bytes));
  }
  template <typename T>
  void check(const SmallVector<T>& vector) {
    vector.with_buffer([&](const auto& buffer) { check(buffer); });
  }

 private:
  std::vector<std::pair<std::string, std::vector<unsigned char>>> seen_;
};

// In the race build: how often kernels have read or written a feature map, in passes over it.
template <typename T>
void require_passes(const Buffer<T>& buffer, int read, int written) {
  if (!host::kRaceBuild) return;
  const host::Traffic traffic = buffer.traffic();
  host::require(traffic.read == read * buffer.bytes() && traffic.written == written * buffer.bytes(),
                buffer.name() + ": " + std::to_string(traffic.read) + " bytes read and " +
                    std::to_string(traffic.written) + " written, expected " + std::to_string(read) + " and " +
                    std::to_string(written) + " passes over " + std::to_string(buffer.bytes()) + " bytes");
}

// In the race build: how often the cache lines of a matrix were prefetched.
template <typename T>
void require_prefetched(const Buffer<T>& buffer, int times) {
  if (!host::kRaceBuild) return;
  const std::size_t lines = times * ((buffer.bytes() + 127) / 128);
  host::require(buffer.traffic().prefetched == lines, buffer.name() + ": " +
                                                          std::to_string(buffer.traffic().prefetched) +
                                                          " lines prefetched, expected " + std::to_string(lines));
}

// Calls body(T{}) for each element type that is named.
template <typename Body>
void each_type(bool all, const Body& body) {
  body(float{});
  body(__half{});
  if (!all) return;
  body(__nv_bfloat16{});
  body(double{});
}

inline constexpr Layout kLayouts[] = {Layout::kNCHW, Layout::kNHWC};

}  // namespace gc::drivers
