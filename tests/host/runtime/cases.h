// A driver: a program that runs the cases of one family of kernels under every schedule and compares what they compute
// with plain loops in double precision.
//
//   driver [--case NAME]... [--schedule ORDER[:SEED]]... [--drop-site N] [--first] [--list]
//
// It prints a line for each case that fails under a schedule, and exits with 1 if one did. --first stops there.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "schedule.h"

namespace gc::host {

struct Case {
  std::string name;
  std::string reason;  // why this shape is among the cases
  std::function<void(const Schedule&)> run;
};

class CheckError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws CheckError, with the message, if not `ok`.
void require(bool ok, const std::string& message);

// |got - want| <= tolerance. An expected NaN must be a NaN and an expected infinity that infinity; a NaN or infinity
// that is not expected fails.
void require_close(const std::string& what, double got, double want, double tolerance);

int run_cases(int argc, char** argv, const std::vector<Case>& cases);

}  // namespace gc::host
