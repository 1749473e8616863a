// The whole context block as csrc/ops/global_context.h launches it: how many launches it takes and how many bytes all of them
// move together, against the formula. What each launch computes is the other drivers' concern; here the values that
// pass from one launch to the next are checked once more at the end of the chain, in out and grad_x.
#include "cuda/kernels/transform_slab.h"
#include "whole_block.h"

namespace gc::drivers {
namespace {

// Where the transform merges what the pooling leaves, there have to be several splits, and more than one round takes.
constexpr int kLateMultiprocessors = 20;

// Within 5 % of the formula, for all that the launches of a pass have moved.
void require_within(const char* pass, double moved, int formula) {
  if (!host::kRaceBuild) return;
  host::require(moved >= formula && moved <= 1.05 * formula, std::string(pass) + " moved " + std::to_string(moved) +
                                                                 " times the feature map, the formula says " +
                                                                 std::to_string(formula));
}

template <typename T>
void run(bool attention, const Fusion& fusion, Layout layout, const host::Schedule& schedule, Paths paths) {
  Block<T> block(attention, fusion, layout, paths);
  host::LaunchFiles::launches = 0;
  block.forward(schedule);
  host::require(host::LaunchFiles::launches == 3, "forward takes three launches");
  const double forward = block.passes();
  require_within("forward", forward, 3);
  block.check_out();

  host::LaunchFiles::launches = 0;
  block.backward(schedule);
  host::require(host::LaunchFiles::launches == 3, "backward takes three launches");
  // The mean's backward does not read x unless for channel_mul.
  require_within("backward", block.passes() - forward, (attention ? 4 : 3) + (fusion.mul ? 1 : 0));
  block.check_grad_x();
}

// The forward pass in both ways: with the merge in the transform, what the pooling leaves moves as many bytes as there
// are splits, and everything together moves fewer than with two rounds of merging in the pooling.
template <typename T>
void run_late(bool attention, const Fusion& fusion, Layout layout, const host::Schedule& schedule) {
  const Paths paths = paths_under(schedule);
  Block<T> before(attention, fusion, layout, paths, kLateMultiprocessors);
  Block<T> late(attention, fusion, layout, paths | Path::kLateMerge, kLateMultiprocessors);
  for (Block<T>* block : {&before, &late}) {
    host::LaunchFiles::launches = 0;
    block->forward(schedule);
    host::require(host::LaunchFiles::launches == 3, "forward takes three launches");
    block->check_state();
    block->check_out();
    require_passes(block->x.buffer(), 2, 0);
    require_passes(block->out.buffer(), 0, 1);
  }
  if (!host::kRaceBuild) return;
  const Plan plan = late.pool_plan();
  const std::uint64_t values = sizeof(Acc<T>) * kShape.images * plan.walk.splits;
  const std::uint64_t written = values * (kShape.channels + (attention ? 2 : 0));
  const std::uint64_t read = values * (kShape.channels + (attention ? 2 * kShape.channels / 32 : 0));
  const host::Traffic own = late.partials->traffic(), other = before.partials->traffic();
  const std::string what = "partial results: " + std::to_string(own.read) + " bytes read and " +
                           std::to_string(own.written) + " written, in two rounds " + std::to_string(other.read) +
                           " and " + std::to_string(other.written) + ", expected " + std::to_string(read) + " and " +
                           std::to_string(written) + " by " + plan.to_string();
  host::require(own.read == read && own.written == written, what);
  host::require(own.read < other.read && own.written < other.written, what);
  host::require(late.passes() < before.passes(), "all launches move fewer bytes than with two rounds");
}

// The backward pass in both ways: the same bits, with fewer bytes moved.
template <typename T>
void run_late_backward(bool attention, const Fusion& fusion, Layout layout, const host::Schedule& schedule) {
  using A = Acc<T>;
  Block<T> before(attention, fusion, layout, paths_under(schedule), kLateMultiprocessors);
  Block<T> late(attention, fusion, layout, paths_under(schedule), kLateMultiprocessors);
  double moved[2] = {};
  for (Block<T>* block : {&before, &late}) {
    host::LaunchFiles::launches = 0;
    block->forward(schedule);
    if (block == &late) block->device.paths = block->device.paths | Path::kLateMerge;
    double& own = moved[block == &late];
    own = -block->passes();
    host::LaunchFiles::launches = 0;
    block->backward(schedule);
    host::require(host::LaunchFiles::launches == 3, "backward takes three launches");
    own += block->passes();
    // Of so many blocks, broadcast fetches the ends of short rows twice.
    if (attention) require_within("backward", own, 4 + (fusion.mul ? 1 : 0));
  }
  late.check_grad_x();
  const auto require_same = [&](const char* what, const auto* one, const auto* other, std::size_t count) {
    host::require(std::memcmp(one, other, count * sizeof(*one)) == 0, std::string(what) + " has other bits");
  };
  require_same("grad_x", before.grad_x.buffer().data(), late.grad_x.buffer().data(), kShape.elements());
  for (int b = 0; b < before.branches; ++b) {
    const auto &one = before.branch[b], &other = late.branch[b];
    require_same("grad_w1", one.grad_w1, other.grad_w1, before.matrix);
    require_same("grad_b1", one.grad_b1, other.grad_b1, kHidden);
    require_same("grad_norm_weight", one.grad_norm_weight, other.grad_norm_weight, kHidden);
    require_same("grad_norm_bias", one.grad_norm_bias, other.grad_norm_bias, kHidden);
    require_same("grad_w2", one.grad_w2, other.grad_w2, before.matrix);
    require_same("grad_b2", one.grad_b2, other.grad_b2, kShape.channels);
  }
  const Plan plan = late.sums_plan();
  host::require(plan.walk.merged_later && plan.walk.splits == before.sums_plan().walk.splits,
                "as many splits in both ways: " + plan.to_string());
  if (!host::kRaceBuild) return;
  host::require(moved[1] < moved[0], "all launches move fewer bytes than with two rounds");
  // Read for the matrix, by one slab beside the other, and for the bias.
  const std::uint64_t bytes = sizeof(A) * before.outputs * plan.walk.splits * before.branches;
  const std::uint64_t reads = slabs_across(kHidden) + 1;
  const host::Traffic traffic = late.partials->traffic();
  host::require(traffic.written == bytes && traffic.read == reads * bytes,
                "partial results: " + std::to_string(traffic.read) + " bytes read and " +
                    std::to_string(traffic.written) + " written, expected " + std::to_string(reads) + " times " +
                    std::to_string(bytes) + " and " + std::to_string(bytes) + " by " + plan.to_string());
}

std::vector<host::Case> cases() {
  constexpr Fusion kFusions[] = {{"add", true, false}, {"mul", false, true}, {"both", true, true}};
  std::vector<host::Case> list;
  for (const bool attention : {true, false}) {
    for (const Fusion& fusion : kFusions) {
      for (const Layout layout : kLayouts) {
        each_type(false, [&](auto element) {
          using T = decltype(element);
          list.push_back({std::string(attention ? "att-" : "avg-") + fusion.name + "-" + Element<T>::name + "-" +
                              gc::name_of(layout),
                          "a block as in a network", [=](const host::Schedule& schedule) {
                            run<T>(attention, fusion, layout, schedule, paths_under(schedule));
                          }});
          if (fusion.add && fusion.mul && sizeof(T) == sizeof(float)) {
            list.push_back({"late-" + list.back().name, "the transform merges what the pooling leaves",
                            [=](const host::Schedule& schedule) { run_late<T>(attention, fusion, layout, schedule); }});
          }
          if (sizeof(T) == sizeof(float)) {
            list.push_back(
                {std::string("late-backward-") + (attention ? "att-" : "avg-") + fusion.name + "-" +
                     gc::name_of(layout),
                 "the transform merges what the sums of the gradient leave",
                 [=](const host::Schedule& schedule) { run_late_backward<T>(attention, fusion, layout, schedule); }});
          }
        });
      }
    }
  }
  list.push_back({"refused", "a driver that knows no launches that begin early", [=](const host::Schedule& schedule) {
                    host::LaunchFiles::refuse_early = true;
                    const auto back =
                        std::shared_ptr<void>(nullptr, [](void*) { host::LaunchFiles::refuse_early = false; });
                    run<float>(true, kFusions[2], Layout::kNCHW, schedule, Path::kEarlyStart);
                  }});
  return list;
}

}  // namespace
}  // namespace gc::drivers

int main(int argc, char** argv) { return gc::host::run_cases(argc, argv, gc::drivers::cases()); }
