// A laboratory for one GPU: what the plan for one launch forward and one backward rests on, measured in a minute or
// two.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -Icsrc -Ibench bench/lab.cu -o build/lab     (or bench/lab.sh OUTPUT [ARCH])
//   build/lab [--quick] [--only PREFIX] [--json FILE] [--list]
//
// It needs no torch and no libraries but the driver's. Topics: copy, meet, fill, phases, cache, launch; --only takes a
// topic or the beginning of topic/variant. Every variant is checked before it is timed (or at every launch); a table
// with the rule that a number decides goes to stdout, progress to stderr, and after every topic what there is to FILE.
//
// Each topic runs in a process of its own, which ends with a fault or when its time is up; the variant it was in is
// noted as FAILED and another process goes on after it. The process that you start never touches the GPU.
#include "lab/topic_cache.h"
#include "lab/topic_copy.h"
#include "lab/topic_fill.h"
#include "lab/topic_launch.h"
#include "lab/topic_meet.h"
#include "lab/workers.h"

namespace {

using namespace gc::lab;
struct Topic {
  const char* name;
  void (*run)(Lab&);
  int expected_s;  // on an H100, a guess until it has been run
  int limit_s;     // all its processes together
};

const Topic kTopics[] = {
    {"copy", topic_copy, 5, 30},     {"meet", topic_meet, 8, 30},   {"fill", topic_fill, 6, 30},
    {"phases", topic_phases, 5, 30}, {"cache", topic_cache, 4, 20}, {"launch", topic_launch, 5, 20},
};

struct Options {
  bool quick = false;
  bool list = false;
  std::string only, json, worker, after;
};

// No variant takes longer, nor does a process to start.
constexpr std::chrono::seconds kSilence(15);
// All topics together.
constexpr std::chrono::seconds kLimit(150);

// --- the worker ---

void say_facts(const Lab& lab) {
  const auto say = [](const char* name, const std::string& value) {
    std::printf("fact\t%s\t%s\n", name, value.c_str());
  };
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  const auto attribute = [](cudaDeviceAttr which) {
    int value = 0;
    LAB_CUDA(cudaDeviceGetAttribute(&value, which, 0));
    return std::to_string(value);
  };
  int driver = 0, runtime = 0;
  LAB_CUDA(cudaDriverGetVersion(&driver));
  LAB_CUDA(cudaRuntimeGetVersion(&runtime));
  say("GPU", lab.device.name);
  say("compute capability", std::to_string(lab.device.major) + "." + std::to_string(lab.device.minor));
  if (std::FILE* const file = std::fopen("/proc/driver/nvidia/version", "r")) {
    char line[256] = "";
    if (std::fgets(line, sizeof(line), file) != nullptr) say("driver", one_line(line));
    std::fclose(file);
  }
  say("CUDA of the driver", version(driver));
  say("CUDA runtime", version(runtime));
  say("multiprocessors", std::to_string(lab.blocks));
  say("L2 bytes", std::to_string(lab.device.l2CacheSize));
  say("shared memory a block, bytes", std::to_string(lab.device.sharedMemPerBlockOptin));
  say("highest SM clock, kHz", attribute(cudaDevAttrClockRate));
  say("highest memory clock, kHz", attribute(cudaDevAttrMemoryClockRate));
  std::fflush(stdout);
}

int work(const Options& options) {
  for (const Topic& topic : kTopics) {
    if (options.worker != topic.name) continue;
    try {
      Lab lab(topic.name, options.only, options.after, options.quick);
      say_facts(lab);
      topic.run(lab);
      std::fflush(stdout);
      std::_Exit(0);  // the driver's process ends with it: no time for tidying up
    } catch (const std::exception& error) {
      std::printf("died\t%s\n", one_line(error.what()).c_str());
      std::fflush(stdout);
      std::_Exit(4);
    }
  }
  return 2;
}

// --- the parent ---

bool write_file(const std::string& path, const std::string& text) {
  std::FILE* const file = std::fopen(path.c_str(), "w");
  if (file == nullptr) return false;
  const bool good = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  return std::fclose(file) == 0 && good;
}

int conduct(const Options& options) {
  Results results;
  Facts facts;
  int expected = 0;
  for (const Topic& topic : kTopics) expected += wanted(topic.name, options.only) ? topic.expected_s : 0;
  std::fprintf(stderr, "lab: about %d s%s\n", expected, options.quick ? ", less with --quick" : "");
  const auto begin = Clock::now();
  char date[64] = "";
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof(date), "%Y-%m-%d %H:%M UTC", std::gmtime(&now));
  facts.emplace_back("date", date);
  facts.emplace_back("samples", options.quick ? "20, --quick" : "30");
  for (const Topic& topic : kTopics) {
    if (!wanted(topic.name, options.only)) continue;
    std::fprintf(stderr, "%s: about %d s\n", topic.name, topic.expected_s);
    const auto topic_begin = Clock::now();
    const auto end = std::min(begin + kLimit, topic_begin + std::chrono::seconds(topic.limit_s));
    run_workers({topic.name, options.only, options.quick, end, kSilence}, results, facts);
    const std::chrono::duration<double> took = Clock::now() - topic_begin;
    std::fprintf(stderr, "%s: %.1f s\n", topic.name, took.count());
    if (!options.json.empty() && !write_file(options.json, json(results, facts))) {
      std::fprintf(stderr, "lab: cannot write %s\n", options.json.c_str());
    }
  }
  std::fputs(table(results, facts).c_str(), stdout);
  int failed = 0, good = 0;
  for (const Row& row : results.rows()) {
    failed += row.status == "FAILED";
    good += row.good();
  }
  const std::chrono::duration<double> took = Clock::now() - begin;
  std::fprintf(stderr, "lab: %d variants measured, %d failed, %.1f s\n", good, failed, took.count());
  return good > 0 && failed == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> std::string {
      if (i + 1 < count) return words[++i];
      std::fprintf(stderr, "lab: %s wants a value\n", word.c_str());
      std::exit(2);
    };
    if (word == "--quick") {
      options.quick = true;
    } else if (word == "--list") {
      options.list = true;
    } else if (word == "--only") {
      options.only = value();
    } else if (word == "--json") {
      options.json = value();
    } else if (word == "--worker") {
      options.worker = value();
    } else if (word == "--after") {
      options.after = value();
    } else {
      std::fprintf(stderr, "usage: lab [--quick] [--only PREFIX] [--json FILE] [--list]\n");
      return 2;
    }
  }
  if (options.list) {
    for (const Topic& topic : kTopics) std::printf("%s\n", topic.name);
    return 0;
  }
  return options.worker.empty() ? conduct(options) : work(options);
}
