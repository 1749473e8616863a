#include "cuda/plan/transform_plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "cuda/kernels/transform_backward.h"
#include "cuda/kernels/transform_forward.h"

namespace gc {
namespace {

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

int64_t hidden_max(const TransformProblem& p) {
  return p.branches > 1 ? std::max(p.hidden[0], p.hidden[1]) : p.hidden[0];
}
int64_t hidden_sum(const TransformProblem& p) { return p.branches > 1 ? p.hidden[0] + p.hidden[1] : p.hidden[0]; }

void check(const TransformProblem& p) {
  require(p.images > 0 && p.channels > 0 && (p.branches == 1 || p.branches == 2) && p.hidden[0] > 0 &&
              (p.branches == 1 || p.hidden[1] > 0),
          "a launch needs images, channels, one or two branches and hidden units");
  constexpr int64_t kMaxElements = 2147483647 - (1 << 20);
  require(p.images * p.channels <= kMaxElements && hidden_max(p) * p.channels <= kMaxElements &&
              p.images * hidden_max(p) <= kMaxElements,
          "images x channels, hidden units x channels and images x hidden units must each be at most " +
              std::to_string(kMaxElements) + ", got " + std::to_string(p.images) + " images, " +
              std::to_string(p.channels) + " channels, " + std::to_string(hidden_max(p)) + " hidden units");
}

// What a kernel's Shared takes.
template <template <typename> class Shared>
int shared_bytes(ElementType type, int size) {
  CountingArena arena;
  if (type == ElementType::kDouble) {
    Shared<double>{arena, size};
  } else {
    Shared<float>{arena, size};
  }
  return arena.bytes();
}

// Blocks for `work` tiles, slabs or images: at most two a multiprocessor, as many as can run at a time.
int blocks_for(int64_t work, const DeviceLimits& device) {
  return static_cast<int>(std::clamp<int64_t>(work, 1, 2 * device.multiprocessors));
}

}  // namespace

int TransformPlan::blocks() const {
  int total = 0;
  for (int phase = 0; phase < grid.phases; ++phase) total += grid.blocks[phase];
  return total;
}

std::string TransformPlan::to_string() const {
  std::ostringstream out;
  out << name_of(type) << ": phases of";
  for (int phase = 0; phase < grid.phases; ++phase) out << ' ' << grid.blocks[phase];
  out << " blocks";
  if (slab_steps == 0) {
    out << ", loads of " << width << " weights, " << tile_images << " images a tile, rows shared by " << shares[0]
        << " and " << shares[1] << " warps";
  } else {
    out << ", slabs of " << slab_steps * kStepRows << " rows";
  }
  out << ", " << shared_bytes << " bytes shared, " << workspace << " workspace elements";
  if (!(paths == Paths{})) out << "; " << names_of(paths);
  return out.str();
}

int64_t products_elements(const TransformProblem& p) { return p.images * hidden_sum(p); }

TransformPlan make_transform_forward_plan(const TransformProblem& p, const DeviceLimits& device) {
  check(p);
  TransformPlan plan{};
  plan.type = p.type;
  if (device.paths.has(Path::kEarlyStart)) plan.paths = Path::kEarlyStart;
  const bool even = p.channels % 2 == 0 && p.hidden[0] % 2 == 0 && (p.branches == 1 || p.hidden[1] % 2 == 0);
  plan.width = p.pairs && even ? 2 : 1;

  // The hidden units of a tile's images lie in shared memory.
  const int64_t units =
      (device.shared_bytes - shared_bytes<TransformForwardShared>(p.type, 0)) / accumulation_bytes(p.type);
  require(units >= hidden_max(p), "hidden units must be at most " + std::to_string(units) + " on this device, got " +
                                      std::to_string(hidden_max(p)));
  plan.tile_images = static_cast<int>(std::min({p.images, int64_t{kManyImages}, units / hidden_max(p)}));
  plan.shared_bytes = shared_bytes<TransformForwardShared>(p.type, static_cast<int>(plan.tile_images * hidden_max(p)));

  if (device.paths.has(Path::kLateMerge)) {
    plan.paths = plan.paths | Path::kLateMerge;
    plan.grid.blocks[plan.grid.phases++] = blocks_for(p.images * merge_slices(static_cast<int>(p.channels)), device);
  }
  plan.counters = kPhaseCounters;
  const auto tiles = [&](int product) {
    int64_t sum = 0;
    for (int b = 0; b < p.branches; ++b) {
      sum += row_tiles(static_cast<int>(product == 0 ? p.hidden[b] : p.channels), plan.shares[product]);
    }
    return sum * image_tiles(static_cast<int>(p.images), plan.tile_images);
  };
  for (int product = 0; product < 2; ++product) {
    // As many tiles as multiprocessors, as long as every lane has a pair of weights to fetch. Not by the width: whether
    // pairs begin at even addresses must not change the order of additions.
    const int64_t length = product == 0 ? p.channels : hidden_max(p);
    plan.shares[product] = 1;
    while (plan.shares[product] < kTransformWarps && tiles(product) < device.multiprocessors &&
           length >= 2 * plan.shares[product] * kWarp * 2) {
      plan.shares[product] *= 2;
    }
    plan.grid.blocks[plan.grid.phases++] = blocks_for(tiles(product), device);
  }
  plan.workspace = products_elements(p);
  return plan;
}

TransformPlan make_transform_backward_plan(const TransformProblem& p, const DeviceLimits& device,
                                           TransformDepth depth) {
  check(p);
  TransformPlan plan{};
  plan.type = p.type;
  if (device.paths.has(Path::kEarlyStart)) plan.paths = Path::kEarlyStart;
  if (device.paths.has(Path::kLateMerge)) plan.paths = plan.paths | Path::kLateMerge;
  plan.width = 1;
  // The slabs of W2 and of W1, those of both branches as of one matrix.
  const auto output_slabs = [&] { return slabs_down(p.channels, plan.slab_steps) * slabs_across(hidden_sum(p)); };
  const auto input_slabs = [&] { return slabs_down(hidden_sum(p), plan.slab_steps) * slabs_across(p.channels); };
  // High slabs leave fewer partial results; lower ones are better where high ones would leave multiprocessors idle. A
  // block's images go by one after the other: where there are many, two blocks of a multiprocessor hide each other's
  // waiting.
  const int64_t wanted = p.images >= 2 * kSlabImages ? 2 * device.multiprocessors : device.multiprocessors / 2;
  plan.slab_steps = kMaxSlabSteps;
  const auto bytes = [&] { return shared_bytes<TransformBackwardShared>(p.type, plan.slab_steps); };
  while (bytes() > kSharedWithoutAsking) plan.slab_steps /= 2;
  while (plan.slab_steps > 1 && std::min(output_slabs(), input_slabs()) < wanted) plan.slab_steps /= 2;
  plan.shared_bytes = bytes();
  plan.grid.phases = depth == TransformDepth::kLastLayer ? 1 : 3;
  plan.grid.blocks[0] = blocks_for(output_slabs(), device);
  plan.grid.blocks[1] = blocks_for(p.images * p.branches, device);
  plan.grid.blocks[2] = blocks_for(input_slabs(), device);
  plan.counters = kPhaseCounters + (depth == TransformDepth::kContext ? slabs_across(p.channels) : 0);
  for (int branch = 0; branch < p.branches; ++branch) {
    plan.workspace += backward_workspace(p, plan, branch).total();
  }
  return plan;
}

TransformWorkspace backward_workspace(const TransformProblem& p, const TransformPlan& plan, int branch) {
  const int64_t hidden = p.images * p.hidden[branch];
  TransformWorkspace workspace{};
  if (plan.grid.phases > 1) {
    workspace.partial_y = slabs_down(p.channels, plan.slab_steps) * hidden;
    workspace.grad_y = workspace.grad_hidden = hidden;
  }
  if (plan.counters > kPhaseCounters)
    workspace.partial_context = slabs_down(p.hidden[branch], plan.slab_steps) * p.images * p.channels;
  return workspace;
}

}  // namespace gc
