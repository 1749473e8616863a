#include "cuda/plan/plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "cuda/kernels/broadcast.h"
#include "cuda/kernels/grad_y.h"
#include "cuda/kernels/normalized_pool.h"
#include "cuda/kernels/pool_backward.h"
#include "cuda/kernels/residual.h"
#include "cuda/kernels/residual_sums.h"
#include "cuda/kernels/statistics.h"

namespace gc {
namespace {

constexpr int kMaxGridY = 65535;
constexpr int64_t kMaxGridX = 2147483647 - (1 << 17);  // leaves room for as many groups of partial results
// Pixels, channels and offsets inside an image are 32-bit in the kernels; tiles may reach past its end by less than
// what this leaves.
constexpr int64_t kMaxImageElements = 2147483647 - (1 << 17);
// The last blocks of an image read the partial results of all splits: more splits would cost them more than they save
// the others.
constexpr int64_t kMaxMergedSplits = 256;
constexpr int kThreads = 256;  // of a block, where nothing asks for another number
// A split reads at least so many bytes of every channel: its partial result takes 4 or 8.
constexpr int64_t kLeastSplitBytes = 32;
// A thread adds up its tiles one after the other: more of them would let rounding errors grow with their number.
constexpr int64_t kMaxSummedTiles = 64;
// A grid has room for so many splits of each of many images.
constexpr int64_t kMaxSplits = 65536;
// On a multiprocessor, that the plans count on; and what every architecture from sm_70 has room for.
constexpr int kMostResidentBlocks = 8;
constexpr int kRoomForBlocks = 16;
// Waves that are so full are worth no further wave, for its blocks have to start, too.
constexpr double kFullEnough = 0.9;
constexpr int kMoreWaves = 3;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n && power < (1 << 30)) power *= 2;
  return power;
}

// How many partial results are merged in the first of two rounds: as many as there are groups.
int group_for(int64_t partials, int merged_at_once) {
  int group = merged_at_once;
  while (static_cast<int64_t>(group) * group < partials) ++group;
  return group;
}

// Fewer threads where the map is smaller than the tile, but at least a warp.
TileShape shape_for(int fast, int slow, int64_t fast_useful, int64_t slow_useful) {
  fast = std::min(fast, power_of_two_from(fast_useful));
  slow = std::min(slow, power_of_two_from(slow_useful));
  return {fast, std::max(slow, kWarp / fast)};
}

// A block for kernels that treat channels one by one: long rows of memory in either layout.
void set_free_tile(Plan& plan, const Problem& p, int elements) {
  const bool channels_fast = channels_are_fast(p.layout);
  const int64_t extent = channels_fast ? p.channels : p.pixels;
  const int64_t rows_in_image = channels_fast ? p.pixels : p.channels;
  plan.walk.shape =
      shape_for(kWarp, kThreads / kWarp, divide_up(extent, elements), divide_up(rows_in_image, plan.rows));
}

// Has the kernel every tile that it says may be chosen, and one for each type?
template <typename Traits>
constexpr bool choices_exist() {
  for (const int bytes : {2, 4, 8}) {
    int usable = 0;
    for (const TileChoice& choice : Traits::choices(bytes)) {
      if (choice.rows != Traits::kRows && choice.rows != Traits::kTallRows) return false;
      usable += has_tile<Traits>(choice.rows, Layout::kNCHW, bytes);
    }
    if (usable == 0) return false;
  }
  return true;
}

// A block whose tile holds all channels of its pixels.
template <typename Traits>
void set_whole_tile(Plan& plan, const Problem& p, int elements) {
  static_assert(choices_exist<Traits>(), "tiles to choose from are instantiations of the kernel");
  if (channels_are_fast(p.layout)) {
    const int fast = std::min(power_of_two_from(divide_up(p.channels, elements)), kMaxThreads);
    plan.walk.shape = shape_for(fast, std::max(kThreads / fast, 1), fast, divide_up(p.pixels, plan.rows));
    return;
  }
  // Pixels are contiguous: the fewer threads the channels take, the longer the tile's rows.
  const int64_t fast_useful = divide_up(p.pixels, elements);
  for (const TileChoice& choice : Traits::choices(element_bytes(p.type))) {
    if (!has_tile<Traits>(choice.rows, p.layout, element_bytes(p.type))) continue;
    const int slow = std::min(power_of_two_from(divide_up(p.channels, choice.rows)), choice.threads);
    const int fast = choice.threads / slow;
    plan.rows = choice.rows;
    plan.walk.shape = shape_for(fast, slow, fast_useful, slow);
    const bool whole = static_cast<int64_t>(slow) * choice.rows >= p.channels;
    if (whole && (fast >= fast_useful || fast * kVectorBytes >= choice.row_bytes)) break;
  }
}

// At most `splits` of the tiles, all but the last equally long; or as many, each with a tile more or less than others.
template <typename Traits>
void set_splits(Plan& plan, const Problem& p, int64_t tiles, int64_t splits) {
  constexpr bool even = has_planned_walk<Traits>();
  const int64_t tiles_per_split = even ? tiles / splits : divide_up(tiles, splits);
  if (!even) splits = divide_up(tiles, tiles_per_split);
  require(p.images <= kMaxGridX / splits,
          "images must be at most " + std::to_string(kMaxGridX / splits) + ", got " + std::to_string(p.images));
  plan.walk.images = static_cast<int>(p.images);
  plan.walk.channels = static_cast<int>(p.channels);
  plan.walk.pixels = static_cast<int>(p.pixels);
  plan.walk.splits = static_cast<int>(splits);
  plan.walk.tiles_per_split = static_cast<int>(tiles_per_split);
  plan.walk.longer = even ? static_cast<unsigned short>(tiles % splits) : 0;
  while (1 << plan.walk.fast_shift < plan.walk.shape.fast_threads) ++plan.walk.fast_shift;
  plan.walk.reciprocal = 0xffffffffu / static_cast<unsigned>(splits);
}

// How many blocks of the plan a multiprocessor holds at once.
template <typename Traits>
int resident_on(const Plan& plan) {
  const int blocks = resident_blocks(plan.threads(), Traits::registers(element_bytes(plan.type)));
  return std::clamp(blocks, 1, Traits::kFullMachine ? kRoomForBlocks : kMostResidentBlocks);
}

// Splits, at most so many, with which jobs * splits blocks are whole waves of `slots` blocks as nearly as possible:
// `waves` of them if that can be, or up to kMoreWaves more.
int64_t splits_in_waves(int64_t jobs, int64_t slots, int64_t waves, int64_t most) {
  waves = std::max(waves, divide_up(jobs, slots));
  int64_t best = 1;
  double best_full = 0;
  for (int64_t w = waves; w <= waves + kMoreWaves && best_full < kFullEnough; ++w) {
    const int64_t splits = std::clamp<int64_t>(w * slots / jobs, 1, most);
    const int64_t blocks = jobs * splits;
    const double full = static_cast<double>(blocks) / static_cast<double>(divide_up(blocks, slots) * slots);
    if (full > best_full) best = splits, best_full = full;
  }
  return best;
}

// The rest of a plan for a kernel's flat form.
template <typename Traits>
void set_flat(Plan& plan, const Problem& p, const DeviceLimits& device) {
  plan.flat = true;
  plan.rows = Traits::kFlatRows;
  plan.width = kVectorBytes / element_bytes(p.type);
  plan.chunks = 1;
  plan.holds_channels = true;
  plan.walk.shape = {kThreads, 1};
  plan.walk.group = 1;
  const int64_t tiles = divide_up(p.channels * p.pixels, int64_t{plan.rows} * plan.width * kThreads);
  plan.resident = Traits::kFullMachine ? resident_on<Traits>(plan) : kMostResidentBlocks;
  const int64_t slots = int64_t{device.multiprocessors} * plan.resident;
  if constexpr (Traits::kFullMachine) {
    const int64_t waves = std::clamp<int64_t>(p.images * tiles / slots, 1, Traits::kWaves);
    set_splits<Traits>(plan, p, tiles, splits_in_waves(p.images, slots, waves, tiles));
  } else {
    set_splits<Traits>(plan, p, tiles, std::clamp<int64_t>(slots / p.images, 1, tiles));
  }
}

// Enough blocks to fill the device.
template <typename Traits>
int64_t splits_for(const Plan& plan, const Problem& p, const DeviceLimits& device, int64_t tiles) {
  const int64_t slots = int64_t{device.multiprocessors} * plan.resident;
  const int64_t jobs = p.images * plan.chunks;
  int64_t splits = std::min(std::max<int64_t>(1, slots * Traits::kWaves / jobs), tiles);
  if (Traits::kWaves > 1) return splits;
  const int64_t most = std::min((Traits::kFullMachine ? 2 : 1) * kMaxMergedSplits,
                                std::max<int64_t>(1, p.pixels * element_bytes(p.type) / kLeastSplitBytes));
  splits = Traits::kFullMachine ? splits_in_waves(jobs, slots, 1, std::min(most, tiles)) : std::min(splits, most);
  // By whole factors: as many blocks again and again, so that the last of them end together as before.
  return std::min({splits * divide_up(divide_up(tiles, splits), kMaxSummedTiles), tiles, kMaxSplits});
}

// The workspace and tickets of a merge.
template <typename Traits>
void set_merge(Plan& plan, const DeviceLimits& device) {
  if constexpr (Traits::kMerge == Merge::kByImage) {
    const int images = plan.walk.images, splits = plan.walk.splits;
    const int group = group_for(int64_t{images} * splits, Traits::kMergedAtOnce);
    // One round is enough for twice as many as are merged at once.
    plan.walk.group = int64_t{images} * splits <= 2 * Traits::kMergedAtOnce ? 1 : std::min(splits, group);
    plan.workspace =
        int64_t{Traits::kPartialVectors} * plan.walk.channels * rows_by_image(images, splits, plan.walk.group);
    plan.tickets = int64_t{plan.chunks} * tickets_by_image(images, splits, plan.walk.group);
    return;
  }
  const bool all = Traits::kMerge == Merge::kAll;
  const int partials = all ? plan.walk.images * plan.walk.splits : plan.walk.splits;
  plan.walk.group = group_for(partials, Traits::kMergedAtOnce);
  if (Traits::kMerge == Merge::kNone || (Traits::kMerge == Merge::kImage && partials == 1)) return;
  const int64_t merges = all ? 1 : plan.walk.images;
  const bool late = Traits::kPlannedPaths.has(Path::kLateMerge) && device.paths.has(Path::kLateMerge);
  if (late && partials <= device.late_splits) {
    plan.paths = plan.paths | Path::kLateMerge;
    plan.walk.merged_later = true;
    plan.walk.group = partials;
  }
  const int64_t partial_elements =
      int64_t{Traits::kPartialVectors} * plan.walk.channels + int64_t{Traits::kPartialValues} * plan.chunks;
  plan.workspace = merges * merged_rows(partials, plan.walk.group) * partial_elements;
  if (!plan.walk.merged_later) plan.tickets = merges * plan.chunks * merge_tickets(partials, plan.walk.group);
}

template <typename Traits>
Plan plan_for(const Problem& p, const DeviceLimits& device, bool dots_given) {
  require(p.images > 0 && p.channels > 0 && p.pixels > 0, "a launch needs images, channels and pixels");
  require(p.channels <= kMaxImageElements / p.pixels,
          "one image must have fewer than " + std::to_string(kMaxImageElements) + " elements, got " +
              std::to_string(p.channels) + " channels x " + std::to_string(p.pixels) + " pixels");

  const int bytes = element_bytes(p.type);
  const int elements = kVectorBytes / bytes;
  const bool channels_fast = channels_are_fast(p.layout);

  constexpr bool kEarly = Traits::kPlannedPaths.has(Path::kEarlyStart);
  Plan plan{};
  plan.kind = Traits::kKind;
  plan.paths = Traits::kPaths;
  if (kEarly && device.paths.has(Path::kEarlyStart)) plan.paths = plan.paths | Path::kEarlyStart;
  plan.type = p.type;
  plan.layout = p.layout;
  plan.rows = Traits::kRows;
  plan.walk.backwards = Traits::kBackwards;
  plan.width = elements;
  while (plan.width > 1 &&
         ((channels_fast ? p.channels : p.pixels) % plan.width != 0 || p.alignment % (plan.width * bytes) != 0)) {
    plan.width /= 2;
  }

  if (Traits::kFlatRows > 0 && !channels_fast && plan.width < elements && p.channels * p.pixels % elements == 0 &&
      p.alignment % kVectorBytes == 0) {
    set_flat<Traits>(plan, p, device);
    return plan;
  }

  const bool whole = Traits::kWholeChannels && !dots_given;
  set_free_tile(plan, p, elements);
  if constexpr (Traits::kWholeChannels) {
    if (whole) set_whole_tile<Traits>(plan, p, elements);
  }
  plan.holds_channels = !whole || plan.tile_channels() >= p.channels;
  const int64_t chunks = whole || Traits::kWalksChunks ? 1 : divide_up(p.channels, plan.tile_channels());
  require(chunks <= kMaxGridY, "channels must be at most " + std::to_string(int64_t{kMaxGridY} * plan.tile_channels()) +
                                   ", got " + std::to_string(p.channels));
  plan.chunks = static_cast<int>(chunks);

  const int64_t tiles = divide_up(p.pixels, plan.tile_pixels());
  plan.resident = resident_on<Traits>(plan);
  set_splits<Traits>(plan, p, tiles, splits_for<Traits>(plan, p, device, tiles));
  set_merge<Traits>(plan, device);

  CountingArena arena;
  if (p.type == ElementType::kDouble) {
    Traits::template take_shared<double>(arena, plan.tile(), plan.walk, dots_given);
  } else {
    Traits::template take_shared<float>(arena, plan.tile(), plan.walk, dots_given);
  }
  plan.shared_bytes = arena.bytes();
  if (whole && plan.shared_bytes > device.shared_bytes) plan.holds_channels = false;
  return plan;
}

// Is this a plan that the path is for?
template <typename Traits>
bool suits(const Plan& plan) {
  return (!Traits::kFlatOnly || plan.flat) && has_width<Traits>(plan.width, kVectorBytes / element_bytes(plan.type));
}

// The plan of the first of these paths that is switched on, for such a problem, and fits the device. The last is always
// on.
template <typename Traits, typename... Others>
Plan best_plan(const Problem& p, const DeviceLimits& device, bool dots_given) {
  if constexpr (sizeof...(Others) > 0) {
    if (!Traits::kPaths.within(device.paths)) return best_plan<Others...>(p, device, dots_given);
    const Plan plan = plan_for<Traits>(p, device, dots_given);
    return suits<Traits>(plan) && plan.holds_channels && plan.shared_bytes <= device.shared_bytes
               ? plan
               : best_plan<Others...>(p, device, dots_given);
  } else {
    static_assert(Traits::kPaths == Paths{}, "the last path is the measured one");
    const Plan plan = plan_for<Traits>(p, device, dots_given);
    require(plan.shared_bytes <= device.shared_bytes || !plan.holds_channels,
            "a block needs " + std::to_string(plan.shared_bytes) + " bytes of shared memory, the device has " +
                std::to_string(device.shared_bytes));
    return plan;
  }
}

struct Kernel {
  KernelKind kind;
  const char* name;
  Plan (*plan)(const Problem&, const DeviceLimits&, bool dots_given);
};

// The paths of one kind, the newest first.
template <typename Traits, typename... Others>
constexpr Kernel kernel() {
  static_assert(((Others::kKind == Traits::kKind) && ...), "one kind");
  return {Traits::kKind, Traits::kName, &best_plan<Traits, Others...>};
}

// Every kind, in the order of KernelKind.
constexpr Kernel kKernels[] = {
    kernel<PoolForwardTraits<Weighting::kMask, Path::kTilesAhead>, PoolForwardTraits<Weighting::kMask>>(),
    kernel<PoolForwardTraits<Weighting::kLogits>>(),
    kernel<PoolForwardTraits<Weighting::kUniform, Path::kFullMachine, Path::kNeighbours>,
           PoolForwardTraits<Weighting::kUniform, Path::kNeighbours>,
           PoolForwardTraits<Weighting::kUniform, Path::kFullMachine>, PoolForwardTraits<Weighting::kUniform>>(),
    kernel<PoolBackwardTraits<PoolGradient::kMask>>(),
    kernel<PoolBackwardTraits<PoolGradient::kLogits>>(),
    kernel<PoolBackwardTraits<PoolGradient::kBlock, Path::kStagedGrad>, PoolBackwardTraits<PoolGradient::kBlock>>(),
    kernel<PixelDotTraits>(),
    kernel<BroadcastTraits<Path::kFullMachine>, BroadcastTraits<>>(),
    kernel<BroadcastMulBackwardTraits>(),
    kernel<NormalizedPoolTraits<Weighting::kMask>>(),
    kernel<NormalizedPoolTraits<Weighting::kLogits>>(),
    kernel<NormalizedPoolTraits<Weighting::kUniform>>(),
    kernel<NormalizedPixelDotTraits>(),
    kernel<ResidualTraits>(),
    kernel<StatisticsTraits>(),
    kernel<ResidualSumsTraits>(),
    kernel<GradYTraits>(),
    kernel<NormalizedPoolBackwardTraits>()};

constexpr bool in_order() {
  int kind = 0;
  for (const Kernel& kernel : kKernels) {
    if (static_cast<int>(kernel.kind) != kind++) return false;
  }
  return kind == kKernelKinds;
}
static_assert(in_order(), "kKernels has every kind of KernelKind, in its order");

const Kernel& kernel_of(KernelKind kind) { return kKernels[static_cast<int>(kind)]; }

}  // namespace

const char* name_of(KernelKind kind) { return kernel_of(kind).name; }

const char* name_of(ElementType type) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "float64"};
  return names[static_cast<int>(type)];
}

const char* name_of(Layout layout) { return layout == Layout::kNCHW ? "NCHW" : "NHWC"; }

int element_bytes(ElementType type) { return type == ElementType::kDouble ? 8 : type == ElementType::kFloat ? 4 : 2; }
int accumulation_bytes(ElementType type) { return type == ElementType::kDouble ? 8 : 4; }

BlockTile Plan::tile() const { return block_tile(layout, walk.shape, rows, kVectorBytes / element_bytes(type)); }

Plan make_plan(KernelKind kind, const Problem& problem, const DeviceLimits& device, bool dots_given) {
  return kernel_of(kind).plan(problem, device, dots_given);
}

std::string Plan::to_string() const {
  std::ostringstream out;
  out << name_of(kind) << ' ' << name_of(type) << ' ' << name_of(layout) << ' ' << walk.images << 'x' << walk.channels
      << 'x' << walk.pixels << ": " << rows << " rows of " << kVectorBytes << " bytes a thread, loads of "
      << width * element_bytes(type) << " bytes, " << walk.shape.fast_threads << 'x' << walk.shape.slow_threads
      << " threads" << (flat ? " on flat images, " : ", ") << walk.splits << " splits of " << walk.tiles_per_split
      << (walk.longer > 0 ? " or " + std::to_string(walk.tiles_per_split + 1) : "") << " tiles, merged "
      << (walk.merged_later ? std::string("later") : "by " + std::to_string(walk.group)) << ", grid " << grid_x() << 'x'
      << grid_y() << ", " << shared_bytes << " bytes shared, " << workspace << " workspace elements, " << tickets
      << " tickets";
  if (!(paths == Paths{})) out << "; " << names_of(paths);
  if (!holds_channels) out << "; too many channels for a block: needs pixel_dot first";
  return out.str();
}

}  // namespace gc
