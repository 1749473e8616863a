// How this binary was built.
#pragma once

#include <map>
#include <string>

namespace gc {

// Keys: version (of the package), sources (gc_cuda/_sources.py's fingerprint of them), torch (built against), cuda
// (toolkit, "" for a CPU build), arch_list, compiler.
std::map<std::string, std::string> build_config();

}  // namespace gc
