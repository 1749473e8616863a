// A file of its own, without torch's headers: it is compiled again after every change of any source, which takes a
// second here.
#include "python/build_config.h"

#include "build_facts.h"  // by setup.py: GC_VERSION, GC_SOURCES, GC_BUILD_TORCH, GC_CUDA_VERSION, GC_ARCH_LIST
#include "cuda/plan/paths.h"

namespace gc {

static std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

std::map<std::string, std::string> build_config() {
  chosen_paths();  // asked for at import: a wrong GC_CUDA_PATHS is an error then, and not at the first launch
  return {{"version", GC_VERSION},   {"sources", GC_SOURCES},     {"torch", GC_BUILD_TORCH},
          {"cuda", GC_CUDA_VERSION}, {"arch_list", GC_ARCH_LIST}, {"compiler", compiler_name()}};
}

}  // namespace gc
