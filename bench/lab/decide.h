// The rule that each measurement decides, and what it says of the number that came out. Plain C++; the thresholds are
// those of the plan for one launch forward and one backward.
#pragma once

#include <cmath>

#include "result.h"

namespace gc::lab {

struct Judgement {
  std::string rule;
  std::string verdict;
};

constexpr double kCellLimitUs = 1.2;      // above: steps 1-3 of the chain in clusters
constexpr double kStepUs = 0.9;           // of steps 1 and 4 of the chain at c5
constexpr double kBarrierMarginUs = 0.2;  // a barrier is no more than this above a cell: the tiled form everywhere
constexpr double kClusterGainUs = 0.3;    // what an exchange in clusters must save
constexpr double kRateShare = 0.95;       // of the copy's bytes a second
constexpr double kPrefetchShare = 0.7;    // of the read without a prefetch
constexpr double kHintGainUs = 0.5;
constexpr double kLaunchGainUs = 0.3;  // a launch
constexpr double kHostGainUs = 0.3;    // a call

inline bool starts(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

inline bool ends(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() && text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

inline std::string replaced(std::string text, const std::string& old, const std::string& by) {
  const std::size_t place = text.find(old);
  return place == std::string::npos ? text : text.replace(place, old.size(), by);
}

// The series of a copy's row ("graph queued 34 MB" -> "graph queued "), or empty.
inline std::string copy_series(const std::string& name) {
  const std::size_t digit = name.find_first_of("0123456789");
  return digit == std::string::npos || !ends(name, " MB") ? "" : name.substr(0, digit);
}

// Rows of one series of the copy; "graph " must not take "graph queued " and "graph chain " in.
inline Fit copy_fit(const Results& results, const std::string& series) {
  std::vector<std::pair<double, double>> points;
  for (const Row& row : results.rows()) {
    if (row.good() && row.topic == "copy" && copy_series(row.name) == series) {
      points.emplace_back(row.bytes, row.median());
    }
  }
  return fit_line(points);
}

inline Judgement judge_copy(const Results& results, const Row& row) {
  const std::string series = copy_series(row.name);
  if (series.empty()) return {};
  const Fit fit = copy_fit(results, series);
  if (fit.points < 2 || fit.slope <= 0) return {"time = constant + bytes / rate", "too few sizes for a fit"};
  return {"time = constant + bytes / rate",
          format("%.1f us + bytes / %.2f TB/s; this size is %+.1f us off", fit.constant, 1e-6 / fit.slope,
                 row.median() - fit.constant - fit.slope * row.bytes)};
}

inline Judgement judge_meet(const Results& results, const Row& row) {
  const double time = row.median(), cell = results.median("meet/cells all");
  if (ends(row.name, "resident")) {
    return {"a cluster that does not fit all SMs leaves the rest idle", row.note};
  }
  if (starts(row.name, "cells") && ends(row.name, "2048")) {
    return {format("the plan has %.1f us for a step of the chain that reads all channels", kStepUs),
            format("%+.2f us", time - kStepUs)};
  }
  if (starts(row.name, "cells")) {
    const bool slow = time > kCellLimitUs;
    return {format("cell > %.1f us: steps 1-3 in clusters (step 5)", kCellLimitUs),
            format("%.2f us: ", time) + (slow ? "clusters" : "no clusters")};
  }
  if (starts(row.name, "cluster of")) {
    const std::string rule = format("clusters pay if they save > %.1f us against cells of all blocks", kClusterGainUs);
    const double other = ends(row.name, " 2048") ? results.median("meet/cells 2048") : cell;
    if (other == 0) return {rule, "no cells to compare with"};
    return {rule, format("saves %+.2f us: ", other - time) + (other - time > kClusterGainUs ? "pays" : "does not pay")};
  }
  const std::size_t space = row.name.rfind(' ');
  const double same = results.median("meet/cells" + row.name.substr(space));
  const std::string rule = format("barrier <= cell + %.1f us: tiled form everywhere", kBarrierMarginUs);
  if (same == 0) return {rule, "no cells to compare with"};
  return {rule, format("cell %+.2f us: ", time - same) + (time <= same + kBarrierMarginUs ? "tiled" : "cells")};
}

// Bytes a second against those of the copy of the same topic.
inline Judgement judge_rate(const Results& results, const Row& row) {
  const Row* const copy = results.find(row.topic + "/copy");
  if (row.name == "copy") return {"the yardstick", ""};
  const std::string rule =
      row.topic == "fill"
          ? format("fill >= %.0f %% of the copy's rate, or take bulk; smallest row that keeps it", 100 * kRateShare)
          : format("phase >= %.0f %% of the copy's rate, or mix reads and writes earlier", 100 * kRateShare);
  if (copy == nullptr || row.bytes == 0) return {rule, "no copy to compare with"};
  const double share = row.gigabytes_per_second() / copy->gigabytes_per_second();
  return {rule, format("%.0f %%: ", 100 * share) + (share >= kRateShare ? "good" : "below")};
}

inline Judgement judge_cache(const Results& results, const Row& row) {
  if (row.name == "copy") return {"the yardstick", ""};
  const double time = row.median();
  if (starts(row.name, "15 MB after ")) {
    const std::string pause = row.name.substr(row.name.rfind(", pause"));
    const double without = results.median("cache/15 MB after no prefetch" + pause);
    const std::string rule =
        format("prefetch in if the read takes <= %.0f %% of the one without", 100 * kPrefetchShare);
    if (starts(row.name, "15 MB after no prefetch")) return {rule, "the read without"};
    if (without == 0) return {rule, "nothing to compare with"};
    return {rule, format("%.0f %%: ", 100 * time / without) + (time <= kPrefetchShare * without ? "in" : "out")};
  }
  const std::size_t comma = row.name.find(", ", row.name.find(", ") + 1);
  if (comma == std::string::npos) return {};
  const double without = results.median("cache/" + row.name.substr(0, comma) + ", no hints");
  const std::string rule = format("hint in if it saves > %.1f us", kHintGainUs);
  if (ends(row.name, ", no hints")) return {rule, "the read without"};
  if (without == 0) return {rule, "nothing to compare with"};
  return {rule, format("saves %+.2f us: ", without - time) + (without - time > kHintGainUs ? "in" : "out")};
}

inline Judgement judge_launch(const Results& results, const Row& row) {
  const double time = row.median();
  if (starts(row.name, "three small kernels")) {
    const std::string rule = format("PDL in if it saves >= %.1f us a launch (three here)", kLaunchGainUs);
    if (!ends(row.name, ", PDL")) return {rule, "without"};
    const double without = results.median("launch/" + replaced(row.name, ", PDL", ""));
    if (without == 0) return {rule, "nothing to compare with"};
    const double saved = (without - time) / 3;
    return {rule, format("saves %+.2f us a launch: ", saved) + (saved >= kLaunchGainUs ? "in" : "out")};
  }
  if (starts(row.name, "ordinary") || starts(row.name, "cooperative")) {
    if (ends(row.name, "idle GPU")) {
      const std::string rule = "D5: ordinary launch with roles, unless cooperative is faster by 1 us";
      const double ordinary = results.median("launch/ordinary launch and one exchange, idle GPU");
      if (starts(row.name, "ordinary") || ordinary == 0) return {rule, ""};
      return {rule,
              format("cooperative %+.2f us: ", time - ordinary) + (time < ordinary - 1 ? "cooperative" : "ordinary")};
    }
    return {"D5, patience: adoption ends long before the holder does", row.note};
  }
  if (starts(row.name, "two ordinary")) {
    return {"D5, patience: two launches that want all multiprocessors both end", row.note};
  }
  const std::string rule = format("what a call adds to <<<>>> and is > %.1f us goes", kHostGainUs);
  const double plain = results.median("launch/host: <<<>>>");
  if (row.name == "host: <<<>>>" || plain == 0) return {rule, ""};
  return {rule, format("%+.2f us: ", time - plain) + (time - plain > kHostGainUs ? "goes" : "stays")};
}

inline Judgement judge(const Results& results, const Row& row) {
  if (!row.good()) return {"", row.status + (row.note.empty() ? "" : ": " + row.note)};
  if (row.topic == "copy") return judge_copy(results, row);
  if (row.topic == "meet") return judge_meet(results, row);
  if (row.topic == "fill" || row.topic == "phases") return judge_rate(results, row);
  if (row.topic == "cache") return judge_cache(results, row);
  if (row.topic == "launch") return judge_launch(results, row);
  return {};
}

// What follows from several rows together, a line each.
inline std::vector<std::string> findings(const Results& results) {
  std::vector<std::string> lines;
  const Fit span = copy_fit(results, "span "), chain = copy_fit(results, "graph chain ");
  const Fit queued = copy_fit(results, "graph queued "), graph = copy_fit(results, "graph ");
  if (span.points >= 2 && queued.points >= 2 && graph.points >= 2) {
    lines.push_back(
        format("copy: %.1f us from the first block's begin, %.1f in a graph behind a full queue, %.1f in a "
               "graph on an idle stream (the plan had 2.7 for the profiler and 10.1 for the last)",
               span.constant, queued.constant, graph.constant));
    lines.push_back(format("copy: so %.1f us of a replay are launch and events, and %.1f the host's",
                           queued.constant - span.constant, graph.constant - queued.constant));
  }
  if (chain.points >= 2 && chain.slope > 0) {
    lines.push_back(format("copy: a further node of a graph costs %.1f us + bytes / %.2f TB/s", chain.constant,
                           1e-6 / chain.slope));
  }
  // Step 1 of the chain is scattered, steps 2 and 4 read all channels, step 3 the hidden units (128 at c5, r 1/16).
  const double scattered = results.median("meet/cells scattered 2048"), channels = results.median("meet/cells 2048");
  const double hidden = results.median("meet/cells all");
  if (scattered > 0 && channels > 0 && hidden > 0) {
    lines.push_back(format("chain of c5: its four exchanges alone take %.1f us (the plan has 4.8 with the arithmetic)",
                           scattered + 2 * channels + hidden));
  }
  // The smallest rows that a fill takes at full rate, for each way and 512 threads.
  const Row* const copy = results.find("fill/copy");
  for (const char* way : {"cp.async 16", "cp.async 8", "cp.async 4", "bulk", "loads"}) {
    for (const char* rows : {"rows of 64", "rows of 128", "rows of 256", "rows of 512", "flat"}) {
      const Row* const row = results.find("fill/fill " + std::string(way) + ", " + rows + ", 512 threads");
      if (copy == nullptr || row == nullptr) continue;
      if (row->gigabytes_per_second() < kRateShare * copy->gigabytes_per_second()) continue;
      lines.push_back("fill by " + std::string(way) +
                      format(": >= %.0f %% of the copy's rate from ", 100 * kRateShare) + rows + " on");
      break;
    }
  }
  return lines;
}

}  // namespace gc::lab
