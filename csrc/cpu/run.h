// How each kernel's work is given to threads: run(args) does all of it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/dispatch.h"

namespace gc::cpu {

// Below this many elements per thread, starting the thread costs more than it gains.
inline constexpr int64_t kGrainElements = 32 * 1024;

// Calls body(begin, end) on ranges of 0..count, `elements` of x to each item.
template <typename Body>
void parallel(int64_t count, int64_t elements, const Body& body) {
  if (count == 0) return;
  at::parallel_for(0, count, std::max<int64_t>(1, divide_up(kGrainElements, std::max<int64_t>(1, elements))), body);
}

// Calls body(split_begin, split_end) on ranges of all images' splits.
template <typename Body>
void parallel_splits(const Shape& shape, const Plan& plan, const Body& body) {
  parallel(shape.images * plan.splits, shape.channels * shape.pixels / plan.splits, body);
}

template <typename T>
void run(const PoolArgs<T>& args) {
  const Kernels<T>& k = kernels<T>();
  const Shape& shape = args.shape;
  parallel_splits(shape, args.plan, [&](int64_t begin, int64_t end) { k.pool(args, begin, end); });
  if (args.plan.splits > 1) {
    // Partial results are few and still in cache: they take a fraction of the time of as many elements of x.
    parallel(shape.images, divide_up(args.plan.splits * shape.channels, 8),
             [&](int64_t begin, int64_t end) { k.pool_merge(args, begin, end); });
  }
}

template <typename T>
void run(const PoolBackwardArgs<T>& args) {
  const Kernels<T>& k = kernels<T>();
  parallel_splits(args.shape, args.plan, [&](int64_t begin, int64_t end) { k.pool_backward(args, begin, end); });
  if (args.plan.splits > 1) {
    parallel(args.shape.images * args.plan.splits, args.shape.pixels / args.plan.splits,
             [&](int64_t begin, int64_t end) { k.pool_backward_balance(args, begin, end); });
  }
}

// Calls body(strip_begin, strip_end) on ranges of all images' strips.
template <typename Body>
void parallel_strips(const Shape& shape, const Body& body) {
  const Strips strips = make_strips(shape);
  parallel(shape.images * strips.count(), strips.rows * strips.columns, body);
}

template <typename T>
void run(const GradXArgs<T>& args) {
  parallel_strips(args.shape, [&](int64_t begin, int64_t end) { kernels<T>().grad_x(args, begin, end); });
}

template <typename T>
void run(const BroadcastArgs<T>& args) {
  parallel_strips(args.shape, [&](int64_t begin, int64_t end) { kernels<T>().broadcast(args, begin, end); });
}

template <typename T>
void run(const BroadcastBackwardArgs<T>& args) {
  parallel_splits(args.shape, args.plan,
                  [&](int64_t begin, int64_t end) { kernels<T>().broadcast_backward(args, begin, end); });
}

template <typename T>
void run(const StatisticsArgs<T>& args) {
  parallel_splits(args.shape, args.plan,
                  [&](int64_t begin, int64_t end) { kernels<T>().statistics(args, begin, end); });
}

template <typename T>
void run(const ResidualSumsArgs<T>& args) {
  parallel_splits(args.shape, args.plan,
                  [&](int64_t begin, int64_t end) { kernels<T>().residual_sums(args, begin, end); });
}

template <typename T>
void run(const ResidualArgs<T>& args) {
  parallel_strips(args.shape, [&](int64_t begin, int64_t end) { kernels<T>().residual(args, begin, end); });
}

template <typename T>
void run(const GradYArgs<T>& args) {
  parallel_strips(args.shape, [&](int64_t begin, int64_t end) { kernels<T>().grad_y(args, begin, end); });
}

// The sums are in T's accumulation type. Any T that has it will do.
template <typename T>
void run(const ReduceArgs<acc_t<T>>& args) {
  parallel(args.groups * args.width, args.members,
           [&](int64_t begin, int64_t end) { kernels<T>().reduce(args, begin, end); });
}

// [groups, members, width] -> [groups, width]; the members are added in the same order however many threads there are.
template <typename T>
void add_members(const acc_t<T>* members_of_groups, acc_t<T>* sums, int64_t groups, int64_t members, int64_t width) {
  ReduceArgs<acc_t<T>> args{};
  args.in = members_of_groups;
  args.out = sums;
  args.groups = groups;
  args.members = members;
  args.width = width;
  run<T>(args);
}

}  // namespace gc::cpu
