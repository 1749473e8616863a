// The laboratory's part that needs no GPU, for tests/host/test_lab.py:
//
//   report json|table < ROWS      what it makes of rows, one a line as workers give them
//   report workers TOPIC          what it makes of workers that behave as TOPIC says; this program is the worker, too
#include <iostream>

#include "lab/workers.h"

namespace {

using namespace gc::lab;

void say(const std::string& line) {
  std::puts(line.c_str());
  std::fflush(stdout);
}

void say_row(const std::string& topic, const std::string& name) {
  Row row;
  row.topic = topic;
  row.name = name;
  row.samples = {1, 2, 4};
  say("begin\t" + name);
  say("row\t" + to_line(row));
}

// Three variants, of which the second goes wrong in the way of the topic.
int work(const std::string& topic, const std::string& after) {
  if (topic == "dead on arrival") std::abort();
  say("fact\tGPU\tinvented");
  if (after.empty()) say_row(topic, "one");
  if (after == "" || after == "one") {
    if (topic == "lost context") {
      say("begin\ttwo");
      Row row;
      row.topic = topic;
      row.name = "two";
      row.status = "FAILED";
      row.note = "cudaErrorIllegalAddress";
      say("row\t" + to_line(row));
      return kContextLost;
    }
    if (topic == "fault") say("begin\ttwo"), std::abort();
    if (topic == "stuck") say("begin\ttwo"), pause();
    if (topic == "half a line") say("begin\ttwo"), std::printf("row\thalf"), std::fflush(stdout), std::_Exit(0);
    say_row(topic, "two");
    if (topic == "dies between") {
      say("died\tno memory");
      return 4;
    }
  }
  say_row(topic, "three");
  return 0;
}

int read_rows(bool as_json) {
  Results results;
  for (std::string line; std::getline(std::cin, line);) {
    Row row;
    if (!from_line(line, &row)) return 2;
    results.add(row);
  }
  const Facts facts = {{"GPU", "a \"quoted\" \\ name"}};
  std::cout << (as_json ? json(results, facts) : table(results, facts));
  return 0;
}

}  // namespace

int main(int count, char** words) {
  std::string worker, after;
  for (int i = 1; i + 1 < count; ++i) {
    if (std::string(words[i]) == "--worker") worker = words[i + 1];
    if (std::string(words[i]) == "--after") after = words[i + 1];
  }
  if (!worker.empty()) return work(worker, after);
  const std::string what = count > 1 ? words[1] : "";
  if (what == "json" || what == "table") return read_rows(what == "json");
  if (what != "workers" || count != 3) return 2;
  Results results;
  Facts facts;
  run_workers({words[2], "", false, Clock::now() + std::chrono::seconds(20), std::chrono::seconds(1)}, results, facts);
  std::cout << json(results, facts);
  return 0;
}
