#include "cuda/plan/plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace gc {
namespace {

constexpr int kMaxGridY = 65535;
constexpr int64_t kMaxGridX = 2147483647 - (1 << 17);  // and as many groups of partial results beside them
// Pixels, channels and offsets inside an image are 32-bit in the kernels; tiles may reach past its end by less than
// this.
constexpr int64_t kMaxImageElements = 2147483647 - (1 << 17);
// The last blocks of an image read every split's sums: more splits would cost them more than they save the others.
constexpr int kMaxMergedSplits = 256;
// Up to here one block merges them all: a second round costs about as much as reading so many.
constexpr int kMergedAtOnce = 8;
// Registers a thread may use (kernels are compiled for kMaxThreads a block), for the blocks that share a
// multiprocessor.
constexpr int kThreadsPerMultiprocessor = 65536 / 128;
// A split reads at least so many bytes of every channel: its partial results take 4 or 8.
constexpr int kLeastSplitBytes = 32;
// A thread adds up its tiles one after the other: more of them would let rounding errors grow with their number.
constexpr int64_t kMaxSummedTiles = 64;
// As far as a grid has room for the splits of many images.
constexpr int64_t kMaxSplits = 65536;
// 32-byte segments reach half the streaming rate of an H100, 128-byte ones 93 % (design.md section 4).
constexpr int kGoodSegment = 128;
constexpr int kFairSegment = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n && power < (1 << 30)) power *= 2;
  return power;
}

bool needs_all_channels(KernelKind kind, bool dots_given) {
  return !dots_given && (kind == KernelKind::kPoolMask || kind == KernelKind::kPoolBackwardMask ||
                         kind == KernelKind::kPoolBackwardLogits || kind == KernelKind::kPoolBackwardBlock);
}

// The parts that are merged in the first of two rounds: as many as there are groups.
int group_for(int64_t parts) {
  int group = kMergedAtOnce;
  while (static_cast<int64_t>(group) * group < parts) ++group;
  return group;
}

struct Tiling {
  int rows;
  TileShape shape;
};

// Fewer threads where the map is smaller than the tile, but at least a warp.
TileShape shape_for(int fast, int slow, int64_t fast_useful, int64_t slow_useful) {
  fast = std::min(fast, power_of_two_from(fast_useful));
  slow = std::min(slow, power_of_two_from(slow_useful));
  return {fast, std::max(slow, kWarp / fast)};
}

// A block whose tile holds all channels of its pixels.
Tiling whole_channel_tiling(KernelKind kind, const Problem& p, int elements) {
  if (p.layout == Layout::kNHWC) {
    const int rows = 8;
    const int fast = std::min(power_of_two_from(divide_up(p.channels, elements)), kMaxThreads);
    return {rows, shape_for(fast, std::max(256 / fast, 1), fast, divide_up(p.pixels, rows))};
  }
  // Pixels are contiguous: the fewer threads the channels take, the longer the segments of memory. In order of
  // preference, as measured on an H100: two blocks of 256 threads on a multiprocessor hide each other's arithmetic,
  // which for halves is worth more than long segments; a tile of 16 rows leaves pool_backward no registers to fetch
  // more than one row of the gradient at a time.
  struct Candidate {
    int rows, threads, segment;
  };
  using Candidates = std::vector<Candidate>;
  static const Candidates forward = {{8, 256, kGoodSegment},
                                     {16, 256, kGoodSegment},
                                     {8, 512, kGoodSegment},
                                     {8, 256, kFairSegment},
                                     {16, 256, kFairSegment},
                                     {8, 512, kFairSegment},
                                     {16, 512, kFairSegment},
                                     {16, 512, 0},
                                     {8, 512, 0}};
  static const Candidates forward_of_halves = {{8, 256, kFairSegment}, {8, 512, kFairSegment}, {8, 512, 0}};
  static const Candidates backward = {{8, 256, kGoodSegment},  {8, 512, kGoodSegment}, {16, 512, kGoodSegment},
                                      {16, 512, kFairSegment}, {16, 512, 0},           {8, 512, 0}};
  const Candidates& candidates = kind != KernelKind::kPoolMask ? backward
                                 : element_bytes(p.type) == 2  ? forward_of_halves
                                                               : forward;
  const int64_t fast_useful = divide_up(p.pixels, elements);
  Tiling tiling{};
  for (const Candidate& candidate : candidates) {
    if (candidate.rows == 16 && p.type != ElementType::kFloat) continue;  // see has_tall_tiles in dispatch.h
    const int slow = std::min(power_of_two_from(divide_up(p.channels, candidate.rows)), candidate.threads);
    const int fast = candidate.threads / slow;
    tiling = {candidate.rows, shape_for(fast, slow, fast_useful, slow)};
    const bool whole = static_cast<int64_t>(slow) * candidate.rows >= p.channels;
    if (whole && (fast >= fast_useful || fast * kVectorBytes >= candidate.segment)) break;
  }
  return tiling;
}

// A block for kernels that treat channels one by one: long segments in either layout.
Tiling free_tiling(const Problem& p, int elements, int rows) {
  const bool channels_fast = channels_are_fast(p.layout);
  const int64_t extent = channels_fast ? p.channels : p.pixels;
  const int64_t rows_in_image = channels_fast ? p.pixels : p.channels;
  return {rows, shape_for(32, 8, divide_up(extent, elements), divide_up(rows_in_image, rows))};
}

// The rest of a plan for kBroadcast's flat form.
Plan flat_plan(Plan plan, const Problem& p, const DeviceLimits& device) {
  constexpr int kThreads = 256;
  plan.flat = true;
  plan.rows = 8;
  plan.width = kVectorBytes / element_bytes(p.type);
  plan.chunks = 1;
  plan.holds_channels = true;
  const int64_t tiles = divide_up(p.channels * p.pixels, int64_t{plan.rows} * plan.width * kThreads);
  const int64_t wanted_blocks = int64_t{device.multiprocessors} * 8;
  const int64_t tiles_per_split = divide_up(tiles, std::clamp<int64_t>(wanted_blocks / p.images, 1, tiles));
  const int64_t splits = divide_up(tiles, tiles_per_split);
  require(p.images <= kMaxGridX / splits,
          "images must be at most " + std::to_string(kMaxGridX / splits) + ", got " + std::to_string(p.images));
  plan.walk = {static_cast<int>(p.images),
               static_cast<int>(p.channels),
               static_cast<int>(p.pixels),
               static_cast<int>(splits),
               static_cast<int>(tiles_per_split),
               1,
               true,
               {kThreads, 1}};
  return plan;
}

int shared_bytes_of(KernelKind kind, const Plan& plan, int elements, bool dots_given) {
  const TileShape shape = plan.walk.shape;
  const Layout layout = plan.layout;
  const bool channels_fast = channels_are_fast(layout);
  const int channels = channels_fast ? elements : plan.rows;
  const int pixels = channels_fast ? plan.rows : elements;
  const int staged = channels * channel_threads(layout, shape);
  const int accumulation = accumulation_bytes(plan.type);
  int total = 0;
  const auto take = [&](int64_t count, int bytes) { total += static_cast<int>((count * bytes + 15) / 16 * 16); };
  const int dots = 2 * over_channels_scratch(layout, shape, pixels);
  switch (kind) {
    case KernelKind::kPoolMask:
      take(staged, accumulation);
      take(dots, accumulation);
      [[fallthrough]];
    case KernelKind::kPoolLogits:
      take(over_pixels_scratch(layout, shape, 1), accumulation);
      take(over_pixels_scratch(layout, shape, channels + 1), accumulation);
      if (plan.walk.splits > 1) {
        take(1, sizeof(int));
        take(3 * merged_at_most(plan.walk.splits, plan.walk.group), accumulation);
      }
      break;
    case KernelKind::kPoolUniform:
      take(over_pixels_scratch(layout, shape, channels + 1), accumulation);
      if (plan.walk.splits > 1) take(1, sizeof(int));
      break;
    case KernelKind::kPoolBackwardMask:
    case KernelKind::kPoolBackwardLogits:
    case KernelKind::kPoolBackwardBlock: {
      const bool mask = kind != KernelKind::kPoolBackwardLogits;
      const int vectors = kind == KernelKind::kPoolBackwardBlock ? 4 : mask ? 3 : 2;
      take(staged_run(channels, vectors, accumulation) * channel_threads(layout, shape), accumulation);
      if (!dots_given) take(dots, accumulation);
      if (mask) take(over_pixels_scratch(layout, shape, channels), accumulation), take(1, sizeof(int));
      break;
    }
    case KernelKind::kPixelDot:
      take(dots, accumulation);
      break;
    case KernelKind::kBroadcast:
      break;
    case KernelKind::kBroadcastMulBackward:
      take(over_pixels_scratch(layout, shape, 2 * channels), accumulation);
      if (plan.walk.splits > 1) take(1, sizeof(int));
      break;
  }
  return total;
}

}  // namespace

const char* name_of(KernelKind kind) {
  static const char* const names[] = {
      "pool_mask",           "pool_logits", "pool_uniform", "pool_backward_mask",    "pool_backward_logits",
      "pool_backward_block", "pixel_dot",   "broadcast",    "broadcast_mul_backward"};
  return names[static_cast<int>(kind)];
}

const char* name_of(ElementType type) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "float64"};
  return names[static_cast<int>(type)];
}

const char* name_of(Layout layout) { return layout == Layout::kNCHW ? "NCHW" : "NHWC"; }

int Plan::tile_channels() const {
  const int per_thread = channels_are_fast(layout) ? kVectorBytes / element_bytes(type) : rows;
  return per_thread * channel_threads(layout, walk.shape);
}

int Plan::tile_pixels() const {
  const int per_thread = channels_are_fast(layout) ? rows : kVectorBytes / element_bytes(type);
  return per_thread * pixel_threads(layout, walk.shape);
}

int element_bytes(ElementType type) { return type == ElementType::kDouble ? 8 : type == ElementType::kFloat ? 4 : 2; }
int accumulation_bytes(ElementType type) { return type == ElementType::kDouble ? 8 : 4; }

Plan make_plan(KernelKind kind, const Problem& p, const DeviceLimits& device, bool dots_given) {
  require(p.images > 0 && p.channels > 0 && p.pixels > 0, "a launch needs images, channels and pixels");
  require(p.channels <= kMaxImageElements / p.pixels,
          "one image must have fewer than " + std::to_string(kMaxImageElements) + " elements, got " +
              std::to_string(p.channels) + " channels x " + std::to_string(p.pixels) + " pixels");

  const int bytes = element_bytes(p.type);
  const int elements = kVectorBytes / bytes;
  const bool channels_fast = channels_are_fast(p.layout);
  const bool whole = needs_all_channels(kind, dots_given);

  Plan plan{};
  plan.kind = kind;
  plan.type = p.type;
  plan.layout = p.layout;
  plan.width = elements;
  while (plan.width > 1 &&
         ((channels_fast ? p.channels : p.pixels) % plan.width != 0 || p.alignment % (plan.width * bytes) != 0)) {
    plan.width /= 2;
  }

  const bool flat = kind == KernelKind::kBroadcast && !channels_fast && plan.width < elements &&
                    p.channels * p.pixels % elements == 0 && p.alignment % kVectorBytes == 0;
  if (flat) return flat_plan(plan, p, device);

  const Tiling tiling = whole                                       ? whole_channel_tiling(kind, p, elements)
                        : kind == KernelKind::kBroadcastMulBackward ? free_tiling(p, elements, 4)
                                                                    : free_tiling(p, elements, 8);
  plan.rows = tiling.rows;
  plan.walk.shape = tiling.shape;
  const int tile_channels = plan.tile_channels();
  plan.holds_channels = !whole || tile_channels >= p.channels;
  const bool chunks_in_block = kind == KernelKind::kPixelDot;
  const int64_t chunks = whole || chunks_in_block ? 1 : divide_up(p.channels, tile_channels);
  require(chunks <= kMaxGridY, "channels must be at most " + std::to_string(int64_t{kMaxGridY} * tile_channels) +
                                   ", got " + std::to_string(p.channels));
  plan.chunks = static_cast<int>(chunks);

  // Splits: enough blocks to fill the device; where nothing is merged, a few waves of them to even out the end.
  const bool merges = kind != KernelKind::kBroadcast && kind != KernelKind::kPixelDot;
  const int resident = std::max(1, kThreadsPerMultiprocessor / plan.threads());
  const int64_t wanted_blocks = int64_t{device.multiprocessors} * std::min(resident, 8) * (merges ? 1 : 4);
  const int64_t tiles = divide_up(p.pixels, plan.tile_pixels());
  int64_t splits = std::max<int64_t>(1, wanted_blocks / (p.images * chunks));
  splits = std::min(splits, tiles);
  if (merges) {
    splits = std::min<int64_t>(splits, kMaxMergedSplits);
    splits = std::min(splits, std::max<int64_t>(1, p.pixels * bytes / kLeastSplitBytes));
    // By whole factors: as many blocks again and again, so that the last of them end together as before.
    splits = std::min({splits * divide_up(divide_up(tiles, splits), kMaxSummedTiles), tiles, kMaxSplits});
  }
  const int64_t tiles_per_split = divide_up(tiles, splits);
  splits = divide_up(tiles, tiles_per_split);
  require(p.images <= kMaxGridX / splits,
          "images must be at most " + std::to_string(kMaxGridX / splits) + ", got " + std::to_string(p.images));
  plan.walk.images = static_cast<int>(p.images);
  plan.walk.channels = static_cast<int>(p.channels);
  plan.walk.pixels = static_cast<int>(p.pixels);
  plan.walk.splits = static_cast<int>(splits);
  plan.walk.tiles_per_split = static_cast<int>(tiles_per_split);
  // pool_backward merges the parts of all images, the others those of an image.
  const bool merges_all = kind == KernelKind::kPoolBackwardMask || kind == KernelKind::kPoolBackwardBlock;
  const int64_t parts = merges_all ? p.images * splits : splits;
  plan.walk.group = group_for(parts);
  const int64_t rows = merged_rows(static_cast<int>(parts), plan.walk.group);
  const int64_t tickets = merge_tickets(static_cast<int>(parts), plan.walk.group);
  // A pass over x has gone before.
  plan.walk.backwards = kind == KernelKind::kBroadcast || kind == KernelKind::kPoolBackwardMask ||
                        kind == KernelKind::kPoolBackwardLogits || kind == KernelKind::kPoolBackwardBlock;

  plan.shared_bytes = shared_bytes_of(kind, plan, elements, dots_given);
  if (whole && plan.shared_bytes > device.shared_bytes) plan.holds_channels = false;
  require(plan.shared_bytes <= device.shared_bytes || !plan.holds_channels,
          "a block needs " + std::to_string(plan.shared_bytes) + " bytes of shared memory, the device has " +
              std::to_string(device.shared_bytes));

  switch (kind) {
    case KernelKind::kPoolMask:
    case KernelKind::kPoolLogits:
    case KernelKind::kPoolUniform:
    case KernelKind::kBroadcastMulBackward: {
      if (splits == 1) break;
      const int64_t sums = kind == KernelKind::kBroadcastMulBackward ? 2 : 1;
      const int64_t stats = kind == KernelKind::kPoolMask || kind == KernelKind::kPoolLogits ? 2 * chunks : 0;
      plan.workspace = p.images * rows * (sums * p.channels + stats);
      plan.tickets = p.images * chunks * tickets;
      break;
    }
    case KernelKind::kPoolBackwardMask:
    case KernelKind::kPoolBackwardBlock:
      plan.workspace = rows * p.channels;
      plan.tickets = chunks * tickets;
      break;
    case KernelKind::kPoolBackwardLogits:
    case KernelKind::kPixelDot:
    case KernelKind::kBroadcast:
      break;
  }
  return plan;
}

std::string Plan::to_string() const {
  std::ostringstream out;
  out << name_of(kind) << ' ' << name_of(type) << ' ' << name_of(layout) << ' ' << walk.images << 'x' << walk.channels
      << 'x' << walk.pixels << ": " << rows << " rows of " << kVectorBytes << " bytes a thread, loads of "
      << width * element_bytes(type) << " bytes, " << walk.shape.fast_threads << 'x' << walk.shape.slow_threads
      << " threads" << (flat ? " on flat images, " : ", ") << walk.splits << " splits of " << walk.tiles_per_split
      << " tiles, merged by " << walk.group << ", grid " << grid_x() << 'x' << grid_y() << ", " << shared_bytes
      << " bytes shared, " << workspace << " workspace elements, " << tickets << " tickets";
  if (!holds_channels) out << "; too many channels for a block: needs pixel_dot first";
  return out.str();
}

}  // namespace gc
