#include "cuda/plan/transform_plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "cuda/kernels/transform_geometry.h"

namespace gc {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int shared_array(int64_t count, int bytes) { return static_cast<int>(divide_up(count * bytes, 16) * 16); }

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

// Blocks for `work` equal pieces: at most two a multiprocessor, as many as can run at a time.
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
    out << ", slabs of " << slab_steps * kSlabStep << " rows";
  }
  out << ", " << shared_bytes << " bytes shared, " << workspace << " workspace elements";
  return out.str();
}

int64_t products_elements(const TransformProblem& p) { return p.images * hidden_sum(p); }

TransformPlan make_transform_forward_plan(const TransformProblem& p, const DeviceLimits& device) {
  check(p);
  TransformPlan plan{};
  plan.type = p.type;
  const bool even = p.channels % 2 == 0 && p.hidden[0] % 2 == 0 && (p.branches == 1 || p.hidden[1] % 2 == 0);
  plan.width = p.pairs && even ? 2 : 1;

  // The hidden units of a tile's images lie in shared memory.
  const int bytes = accumulation_bytes(p.type);
  const int other = shared_array(1, sizeof(int)) + shared_array(2 * kTransformThreads, bytes);
  const int64_t fitting = (device.shared_bytes - other) / (hidden_max(p) * bytes);
  require(fitting >= 1, "hidden units must be at most " + std::to_string((device.shared_bytes - other) / bytes) +
                            " on this device, got " + std::to_string(hidden_max(p)));
  plan.tile_images = static_cast<int>(std::min({p.images, int64_t{kManyImages}, fitting}));
  plan.shared_bytes = other + shared_array(plan.tile_images * hidden_max(p), bytes);

  plan.grid.phases = 2;
  plan.counters = kPhaseCounters;
  const auto tiles = [&](int phase) {
    int64_t sum = 0;
    for (int b = 0; b < p.branches; ++b) {
      sum += row_tiles(static_cast<int>(phase == 0 ? p.hidden[b] : p.channels), plan.shares[phase]);
    }
    return sum * image_tiles(static_cast<int>(p.images), plan.tile_images);
  };
  for (int phase = 0; phase < 2; ++phase) {
    // As many tiles as multiprocessors, as long as every lane has a pair of weights to fetch. Not by the width: whether
    // pairs begin at even addresses must not change the order of additions.
    const int64_t length = phase == 0 ? p.channels : hidden_max(p);
    plan.shares[phase] = 1;
    while (plan.shares[phase] < kTransformWarps && tiles(phase) < device.multiprocessors &&
           length >= 2 * plan.shares[phase] * kWarp * 2) {
      plan.shares[phase] *= 2;
    }
    plan.grid.blocks[phase] = blocks_for(tiles(phase), device);
  }
  plan.workspace = products_elements(p);
  return plan;
}

TransformPlan make_transform_backward_plan(const TransformProblem& p, const DeviceLimits& device,
                                           TransformDepth depth) {
  check(p);
  TransformPlan plan{};
  plan.type = p.type;
  plan.width = 1;
  const auto pieces = [&](int64_t rows, int64_t columns) {
    return divide_up(rows, plan.slab_steps * kSlabStep) * divide_up(columns, kWarp);
  };
  // High slabs leave fewer partial results; lower ones where they would leave multiprocessors idle. A block's images go
  // by one after the other: many of them take two blocks to a multiprocessor, which hide each other's waiting.
  const int64_t wanted = p.images >= 2 * kSlabImages ? 2 * device.multiprocessors : device.multiprocessors / 2;
  // In float64 the highest would take more shared memory than a launch has without asking.
  plan.slab_steps = p.type == ElementType::kDouble ? kMaxSlabSteps / 2 : kMaxSlabSteps;
  while (plan.slab_steps > 1 &&
         std::min(pieces(p.channels, hidden_sum(p)), pieces(hidden_sum(p), p.channels)) < wanted) {
    plan.slab_steps /= 2;
  }
  plan.grid.phases = depth == TransformDepth::kLastLayer ? 1 : 3;
  plan.counters = kPhaseCounters + (depth == TransformDepth::kContext ? divide_up(p.channels, kWarp) : 0);
  plan.grid.blocks[0] = blocks_for(pieces(p.channels, hidden_sum(p)), device);
  plan.grid.blocks[1] = blocks_for(p.images * p.branches, device);
  plan.grid.blocks[2] = blocks_for(pieces(hidden_sum(p), p.channels), device);
  const int bytes = accumulation_bytes(p.type);
  plan.shared_bytes = 2 * shared_array(1, sizeof(int)) +
                      shared_array(kSlabImages * plan.slab_steps * kSlabStep, bytes) +
                      shared_array(kSlabScratch, bytes) + shared_array(slab_totals(plan.slab_steps), bytes);
  for (int branch = 0; branch < p.branches; ++branch) {
    plan.workspace += backward_workspace(p, plan, branch).total();
  }
  return plan;
}

TransformWorkspace backward_workspace(const TransformProblem& p, const TransformPlan& plan, int branch) {
  const int slab_rows = plan.slab_steps * kSlabStep;
  const int64_t hidden = p.images * p.hidden[branch];
  TransformWorkspace workspace{};
  if (plan.grid.phases > 1) {
    workspace.partial_y = divide_up(p.channels, slab_rows) * hidden;
    workspace.grad_y = workspace.grad_hidden = hidden;
  }
  if (plan.counters > kPhaseCounters)
    workspace.partial_context = divide_up(p.hidden[branch], slab_rows) * p.images * p.channels;
  return workspace;
}

}  // namespace gc
