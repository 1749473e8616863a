// The statistics of a batch, in one launch and one read of y:
//
//   mean[c] = sum_ns y[n, c, s] / (N S),   squares[c] = sum_ns (y[n, c, s] - mean[c])^2
//
// y [N, C, S] or [N, S, C]. Written: the mean, 1 / sqrt(squares / (N S) + eps) and the variance without bias,
// squares / (N S - 1), as [C]; the running statistics, moved; and for uniform pooling the state of y - mean, the mean
// over each image's pixels, for which no pass over y is needed then, and with slope and bias the context of x.
//
// Decomposition: as pool_forward's. Block (image * splits + split, chunk) walks the tiles of its split. The mean of its
// first tile is its centre: it adds up the distances to that, and their squares, so that nothing cancels however far
// the values are from 0. At the end it leaves (mean, squares) of its split, the mean as a sum of two numbers. The last
// blocks to arrive merge them in order, those of an image in groups, and then all: in double precision, for a few
// values, where the distances between means are exact enough to be squared.
//
// Moves: y once (N*C*S elements), 3*C values of a partial result for each split.
#pragma once

#include "tail_args.h"
#include "traits.h"

namespace gc {

struct StatisticsTraits : KernelTraits {
  static constexpr KernelKind kKind = KernelKind::kStatistics;
  static constexpr const char* kName = "statistics";
  static constexpr Merge kMerge = Merge::kByImage;
  static constexpr int kPartialVectors = 3;

  template <typename A>
  static GC_BOTH void take_shared(CountingArena& arena, const BlockTile& tile, const Walk&, bool) {
    arena.take<A>(tile.over_pixels(tile.thread_channels));      // centres
    arena.take<A>(tile.over_pixels(2 * tile.thread_channels));  // sums
    arena.take<int>(1);                                         // flag
  }
};

}  // namespace gc

#if defined(GC_DEVICE_CODE)
#include "norm.h"
#include "split_merge.h"
#include "tile.h"

namespace gc {

// A mean as a sum of two numbers: that from which distances were taken, and what is left, which is small.
struct SplitMean {
  double centre, rest;
};

// Count, mean and squares of parts that are added one after the other. Distances are taken to the first part's mean:
// in double the square of what lies between that and the whole's is nothing to worry about.
class Moments {
 public:
  GC_DEVICE void add(double count, SplitMean mean, double squares) {
    if (count_ == 0) first_ = mean;
    const double distance = mean.centre - first_.centre + (mean.rest - first_.rest);
    count_ += count;
    sum_ += count * distance;
    squares_ += squares + count * distance * distance;
  }
  GC_DEVICE SplitMean mean() const { return {first_.centre, first_.rest + sum_ / count_}; }
  GC_DEVICE double squares() const {
    const double squares = squares_ - sum_ * sum_ / count_;
    return squares < 0 ? 0 : squares;  // a NaN stays
  }

 private:
  SplitMean first_ = {};
  double count_ = 0, sum_ = 0, squares_ = 0;
};

// The partial results of a launch: a row for each split, then one for each group of an image's splits.
template <typename T>
class MomentRows {
 public:
  using A = Acc<T>;

  GC_DEVICE MomentRows(const StatisticsArgs& args, int tile_pixels)
      : walk_(args.walk), partials_(static_cast<A*>(args.partials)), tile_pixels_(tile_pixels) {}

  GC_DEVICE int groups() const { return groups_of(walk_.splits, walk_.group); }
  GC_DEVICE int row_of_split(int image, int split) const { return image * walk_.splits + split; }
  // Without groups, that of a split is one of its own.
  GC_DEVICE int row_of_group(int image, int group) const {
    return walk_.group == 1 ? row_of_split(image, group) : walk_.images * walk_.splits + image * groups() + group;
  }
  GC_DEVICE int pixels_of(int first_split, int end_split) const {
    const int step = walk_.tiles_per_split * tile_pixels_;
    const int end = end_split < walk_.splits ? end_split * step : walk_.pixels;
    return end - first_split * step;
  }
  GC_DEVICE int pixels_of_group(int group) const {
    const int end = (group + 1) * walk_.group;
    return pixels_of(group * walk_.group, end < walk_.splits ? end : walk_.splits);
  }

  GC_DEVICE void put(int row, int channel, SplitMean mean, double squares) const {
    A* const at = partials_ + static_cast<long long>(row) * 3 * walk_.channels + channel;
    at[0] = static_cast<A>(mean.centre);
    at[walk_.channels] = static_cast<A>(mean.rest);
    at[2 * walk_.channels] = static_cast<A>(squares);
  }
  GC_DEVICE SplitMean mean(int row, int channel) const {
    const A* const at = partials_ + static_cast<long long>(row) * 3 * walk_.channels + channel;
    return {at[0], at[walk_.channels]};
  }
  GC_DEVICE double squares(int row, int channel) const {
    return partials_[(static_cast<long long>(row) * 3 + 2) * walk_.channels + channel];
  }

 private:
  const Walk& walk_;
  A* partials_;
  int tile_pixels_;
};

inline constexpr int kMomentsAtOnce = 4;  // whose loads are in flight

// One group's splits become its row, for the block's channels.
template <typename T, typename Map>
GC_DEVICE void merge_group(const MomentRows<T>& rows, const Map& map, const Walk& walk, int group) {
  const int first = group * walk.group;
  const int end = first + walk.group < walk.splits ? first + walk.group : walk.splits;
  const int end_channel = map.end_channel();
  GC_UNROLL_BY(1)
  for (int c = map.channel0 + port::thread_index(); c < end_channel; c += port::block_threads()) {
    Moments moments;
    GC_UNROLL_BY(kMomentsAtOnce)
    for (int k = first; k < end; ++k) {
      const int row = rows.row_of_split(map.image, k);
      moments.add(rows.pixels_of(k, k + 1), rows.mean(row, c), rows.squares(row, c));
    }
    rows.put(rows.row_of_group(map.image, group), c, moments.mean(), moments.squares());
  }
}

template <typename T>
GC_DEVICE void move_running(const CompanionOut& running, int channel, double momentum, Acc<T> to) {
  if (running.data == nullptr) return;
  const double before = read<T>({running.data, running.wide}, channel);
  write<T>(running, channel, static_cast<Acc<T>>(momentum * to + (1 - momentum) * before));
}

// All groups become the results, for the block's channels.
template <typename T, typename Map>
GC_DEVICE void merge_all(const StatisticsArgs& args, const MomentRows<T>& rows, const Map& map) {
  using A = Acc<T>;
  const Walk& walk = args.walk;
  const int groups = rows.groups();
  const int count = walk.images * groups;
  const int end_channel = map.end_channel();
  NormArgs norm{};
  norm.weight = args.weight;
  norm.bias = args.bias;
  GC_UNROLL_BY(1)
  for (int c = map.channel0 + port::thread_index(); c < end_channel; c += port::block_threads()) {
    Moments moments;
    int group = 0;
    GC_UNROLL_BY(kMomentsAtOnce)
    for (int i = 0; i < count; ++i) {  // rows of groups follow each other
      const int row = rows.row_of_group(0, 0) + i;
      moments.add(rows.pixels_of_group(group), rows.mean(row, c), rows.squares(row, c));
      group = group + 1 < groups ? group + 1 : 0;
    }
    const double elements = static_cast<double>(walk.images) * walk.pixels;
    const SplitMean exact = moments.mean();
    const A mean = static_cast<A>(exact.centre + exact.rest);
    const A variance = static_cast<A>(moments.squares() / (elements - 1));
    const A inverse_std = static_cast<A>(1 / port::sqrt(moments.squares() / elements + args.eps));
    static_cast<A*>(args.kept.mean)[c] = mean;
    static_cast<A*>(args.kept.inverse_std)[c] = inverse_std;
    static_cast<A*>(args.kept.variance)[c] = variance;
    static_cast<A*>(args.kept.bias)[c] = bias_at<T>(norm, c);
    move_running<T>(args.running_mean, c, args.momentum, mean);
    move_running<T>(args.running_variance, c, args.momentum, variance);
    if (args.state == nullptr) continue;
    const A slope = slope_at<T>(norm, c) * inverse_std;
    const double share = 1.0 / walk.pixels;
    GC_UNROLL_BY(1)
    for (int n = 0; n < walk.images; ++n) {
      double context = 0;
      GC_UNROLL_BY(kMomentsAtOnce)
      for (int g = 0; g < groups; ++g) {
        const SplitMean of_group = rows.mean(rows.row_of_group(n, g), c);
        context += rows.pixels_of_group(g) * share * (of_group.centre - mean + of_group.rest);
      }
      const long long at = static_cast<long long>(n) * (walk.channels + kStatistics) + kStatistics + c;
      static_cast<A*>(args.state)[at] = static_cast<A>(context);
      static_cast<A*>(args.state_of_x)[at] = slope * static_cast<A>(context) + bias_at<T>(norm, c);
    }
  }
  if (args.state == nullptr || port::block_y() != 0) return;
  for (int n = port::thread_index(); n < walk.images; n += port::block_threads()) {
    A* const state = static_cast<A*>(args.state) + static_cast<long long>(n) * (walk.channels + kStatistics);
    state[0] = 0;
    state[1] = static_cast<A>(walk.pixels);
  }
}

template <typename T, Layout kLayout, int kRows, int kWidth>
GC_KERNEL(kMaxThreads, 1)
statistics(const StatisticsArgs args) {
  using A = Acc<T>;
  using TileT = Tile<T, kLayout, kRows, kWidth>;
  constexpr int kChannels = TileT::kChannels;
  constexpr int kPixels = TileT::kPixels;
  static_assert(has_tile<StatisticsTraits>(kRows, kLayout, sizeof(T)), "no plan has such tiles");
  port::let_next_launch_begin();
  const typename TileT::Map map(args.walk);
  const T* const y = static_cast<const T*>(args.y) + map.image0();
  port::SharedArena arena;

  int pixel0 = map.first_tile * map.tile_pixels();
  TileT tile;
  tile.load(y, map, pixel0);
  A centre[kChannels];
  GC_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    centre[c] = 0;
    GC_UNROLL
    for (int p = 0; p < kPixels; ++p) centre[c] += tile(c, p);  // outside of the image they are 0
  }
  A* const centre_scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, kChannels));
  OverPixels<kLayout, kChannels>::publish(map, centre, centre_scratch);
  tile.keep_packed();
  port::sync_block<kSyncCentre>();
  OverPixels<kLayout, kChannels>::collect(map, centre, centre_scratch);
  const int in_first = map.pixels - pixel0 < map.tile_pixels() ? map.pixels - pixel0 : map.tile_pixels();
  GC_UNROLL
  for (int c = 0; c < kChannels; ++c) centre[c] /= static_cast<A>(in_first);

  A sums[2 * kChannels];  // of the distances, then of their squares
  GC_UNROLL
  for (int i = 0; i < 2 * kChannels; ++i) sums[i] = 0;
  for (int tile_index = map.first_tile;;) {
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      A sum = 0;
      A squares = 0;
      GC_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const A distance = map.pixel(pixel0, p) < map.pixels ? tile(c, p) - centre[c] : A(0);
        sum += distance;
        squares += distance * distance;
      }
      sums[c] += sum;
      sums[kChannels + c] += squares;
    }
    if (++tile_index >= map.end_tile) break;
    pixel0 = tile_index * map.tile_pixels();
    tile.load(y, map, pixel0);
  }

  A* const sum_scratch = arena.take<A>(over_pixels_scratch(kLayout, map.shape, 2 * kChannels));
  OverPixels<kLayout, 2 * kChannels>::publish(map, sums, sum_scratch);
  port::sync_block<kSyncMoments>();
  OverPixels<kLayout, 2 * kChannels>::collect(map, sums, sum_scratch);

  const MomentRows<T> rows(args, map.tile_pixels());
  if (map.pixel_thread() == 0) {
    const double count = rows.pixels_of(map.split, map.split + 1);
    GC_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (map.channel(c) >= map.channels) continue;
      const double sum = sums[c];
      const double squares = sums[kChannels + c] - sum * sum / count;
      rows.put(rows.row_of_split(map.image, map.split), map.channel(c), {centre[c], sum / count},
               squares < 0 ? 0 : squares);
    }
  }

  const Walk& walk = args.walk;
  int* const flag = arena.take<int>(1);
  const int groups = rows.groups();
  unsigned* const tickets = args.tickets + port::block_y() * tickets_by_image(walk.images, walk.splits, walk.group);
  if (walk.group > 1) {
    const int group = map.split / walk.group;
    const int left = walk.splits - group * walk.group;
    if (!arrive_last(tickets + map.image * groups + group, left < walk.group ? left : walk.group, flag)) return;
    merge_group(rows, map, walk, group);
  }
  unsigned* const last = walk.group > 1 ? tickets + walk.images * groups : tickets;
  if (arrive_last(last, walk.images * groups, flag)) merge_all(args, rows, map);
}

}  // namespace gc
#endif  // GC_DEVICE_CODE
