#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>

#include "memory.h"
#include "scheduler.h"

namespace gc::host {
namespace {

struct Options {
  std::set<std::string> cases;
  std::vector<Schedule> schedules;
  int dropped_site = -1;
  bool first = false;
  bool list = false;
};

Options options_of(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
      return argv[++i];
    };
    if (name == "--case") {
      options.cases.insert(value());
    } else if (name == "--schedule") {
      options.schedules.push_back(schedule_named(value()));
    } else if (name == "--drop-site") {
      options.dropped_site = std::stoi(value());
    } else if (name == "--first") {
      options.first = true;
    } else if (name == "--list") {
      options.list = true;
    } else {
      throw std::invalid_argument("no option is called " + name);
    }
  }
  if (options.schedules.empty()) options.schedules = all_schedules();
  return options;
}

// The message of what went wrong, or "".
std::string failure_of(const Case& one, const Schedule& schedule) {
  set_poison(schedule.poison());
  try {
    one.run(schedule);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace

void require(bool ok, const std::string& message) {
  if (!ok) throw CheckError(message);
}

void require_close(const std::string& what, double got, double want, double tolerance) {
  if (std::isnan(want) ? std::isnan(got) : std::isinf(want) ? got == want : std::abs(got - want) <= tolerance) return;
  char numbers[128];
  std::snprintf(numbers, sizeof numbers, ": got %.9g, expected %.9g within %.3g", got, want, tolerance);
  throw CheckError(what + numbers);
}

int run_cases(int argc, char** argv, const std::vector<Case>& cases) try {
  const Options options = options_of(argc, argv);
  if (options.list) {
    for (const Case& one : cases) std::printf("%s: %s\n", one.name.c_str(), one.reason.c_str());
    return 0;
  }
  for (const std::string& name : options.cases) {
    const bool known = std::any_of(cases.begin(), cases.end(), [&](const Case& one) { return one.name == name; });
    if (!known) throw std::invalid_argument("no case is called " + name);
  }
  drop_site(options.dropped_site);
  int runs = 0, failures = 0;
  for (const Case& one : cases) {
    if (!options.cases.empty() && options.cases.count(one.name) == 0) continue;
    for (const Schedule& schedule : options.schedules) {
      if (options.first && failures > 0) continue;
      const std::string failure = failure_of(one, schedule);
      ++runs;
      if (failure.empty()) continue;
      ++failures;
      std::printf("FAIL %s, schedule %s: %s\n", one.name.c_str(), name_of(schedule).c_str(), failure.c_str());
      std::fflush(stdout);
    }
  }
  std::printf("%d runs, %d failures; sites", runs, failures);
  for (const int site : sites_reached()) std::printf(" %d", site);
  std::printf("\n");
  return failures == 0 ? 0 : 1;
} catch (const std::invalid_argument& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}

}  // namespace gc::host
