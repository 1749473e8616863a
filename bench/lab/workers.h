// The parent of the laboratory's processes: starts one a topic, reads what it says line by line, ends it when it is
// stuck, notes the variant that it died in and starts another one behind that. Plain C++ and POSIX.
//
// A worker says begin NAME, row FIELDS (see result.h), fact NAME VALUE and died WHY, with tabs between.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "report.h"

namespace gc::lab {

// The status with which a worker ends when a variant, whose row it has given, has cost it its CUDA context.
constexpr int kContextLost = 3;

using Clock = std::chrono::steady_clock;

struct Work {
  std::string topic;
  std::string only;  // a prefix of topic/variant, or empty
  bool quick = false;
  Clock::time_point end;         // of all that the topic's workers do
  std::chrono::seconds silence;  // no variant takes longer, nor does a process to start
};

struct Outcome {           // of one worker
  bool finished = false;   // the worker came to its end
  bool lost = false;       // it ended after a row, as its context was lost
  std::string unfinished;  // the variant it was in, or empty
  std::string last;        // the last variant it began, or empty
  std::string why;
};

inline void keep(Facts& facts, const std::string& name, const std::string& value) {
  for (const auto& fact : facts) {
    if (fact.first == name) return;
  }
  facts.emplace_back(name, value);
}

// Reads what a worker says until it ends, is silent for too long or the time is up, when it is killed.
inline Outcome attend(const Work& work, pid_t child, int pipe, Results& results, Facts& facts) {
  Outcome outcome;
  std::string text;
  bool killed = false;
  Clock::time_point heard = Clock::now();
  for (bool open = true; open;) {
    const Clock::time_point until = std::min(work.end, heard + work.silence);
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    pollfd wait{pipe, POLLIN, 0};
    const int ready = left > 0 ? poll(&wait, 1, static_cast<int>(left)) : 0;
    if (ready == 0 && !killed) {
      outcome.why = until == work.end ? "the time for this topic is up"
                                      : "no word for " + std::to_string(work.silence.count()) + " s";
      kill(child, SIGKILL);
      killed = true;
      break;
    }
    if (ready < 0) continue;
    char buffer[65536];
    const ssize_t count = read(pipe, buffer, sizeof(buffer));
    open = count > 0;
    heard = Clock::now();
    if (count > 0) text.append(buffer, count);
    for (std::size_t end; (end = text.find('\n')) != std::string::npos; text.erase(0, end + 1)) {
      const std::string line = text.substr(0, end);
      Row row;
      if (starts(line, "begin\t")) {
        outcome.last = outcome.unfinished = line.substr(6);
      } else if (starts(line, "row\t") && from_line(line.substr(4), &row)) {
        outcome.unfinished.clear();
        if (row.status != "ok")
          std::fprintf(stderr, "  %s %s: %s\n", row.status.c_str(), row.key().c_str(), row.note.c_str());
        results.add(std::move(row));
      } else if (starts(line, "died\t")) {
        outcome.why = line.substr(5);
      } else if (starts(line, "fact\t")) {
        const std::size_t tab = line.find('\t', 5);
        if (tab != std::string::npos) keep(facts, line.substr(5, tab - 5), line.substr(tab + 1));
      } else if (!line.empty()) {
        std::fprintf(stderr, "  %s: %s\n", work.topic.c_str(), line.c_str());
      }
    }
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  outcome.finished = !killed && WIFEXITED(status) && WEXITSTATUS(status) == 0 && outcome.unfinished.empty();
  if (outcome.why.empty() && WIFSIGNALED(status)) outcome.why = "ended by signal " + std::to_string(WTERMSIG(status));
  outcome.lost = !killed && WIFEXITED(status) && WEXITSTATUS(status) == kContextLost;
  if (outcome.why.empty() && !outcome.finished)
    outcome.why = "ended with status " + std::to_string(WEXITSTATUS(status));
  return outcome;
}

inline pid_t start_worker(const Work& work, const std::string& after, int* pipe_end) {
  int ends[2];
  if (pipe(ends) != 0) return -1;
  std::vector<std::string> words = {"lab", "--worker", work.topic, "--only", work.only, "--after", after};
  if (work.quick) words.push_back("--quick");
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(&word[0]);
  arguments.push_back(nullptr);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    close(ends[0]);
    close(ends[1]);
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // a first launch must not wait for a kernel that holds the GPU
    execv("/proc/self/exe", arguments.data());
    std::_Exit(127);
  }
  close(ends[1]);
  *pipe_end = ends[0];
  return child;
}

// Does a topic have variants that begin so?
inline bool wanted(const std::string& topic, const std::string& only) {
  return starts(topic, only) || starts(only, topic + "/");
}

// Runs all variants of a topic, with as many workers as it takes. The program itself, called with --worker, is one.
inline void run_workers(const Work& work, Results& results, Facts& facts) {
  std::string after;
  for (int tries = 0; tries < 12; ++tries) {
    int pipe_end = -1;
    const pid_t child = start_worker(work, after, &pipe_end);
    if (child < 0) break;
    const Outcome outcome = attend(work, child, pipe_end, results, facts);
    close(pipe_end);
    if (outcome.finished) break;
    Row row;
    row.topic = work.topic;
    row.name = outcome.unfinished.empty()
                   ? "(process after " + (outcome.last.empty() ? "its start" : outcome.last) + ")"
                   : outcome.unfinished;
    row.status = "FAILED";
    row.note = outcome.why;
    if (!outcome.unfinished.empty() || outcome.last.empty() || !outcome.lost) {
      std::fprintf(stderr, "  FAILED %s: %s\n", row.key().c_str(), row.note.c_str());
      results.add(row);
    }
    if (outcome.last.empty() || Clock::now() >= work.end) break;
    after = outcome.last;
  }
}

}  // namespace gc::lab
