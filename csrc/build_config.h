// How this binary was built, from the macros that setup.py defines.
#pragma once

#include <map>
#include <string>

#ifndef GC_VERSION
#define GC_VERSION ""
#endif
#ifndef GC_BUILD_TORCH
#define GC_BUILD_TORCH ""
#endif
#ifndef GC_CUDA_VERSION
#define GC_CUDA_VERSION ""
#endif
#ifndef GC_ARCH_LIST
#define GC_ARCH_LIST ""
#endif

namespace gc {

inline std::string compiler_name() {
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

// Keys: version, torch (built against), cuda (toolkit, "" for a CPU build), arch_list, compiler.
inline std::map<std::string, std::string> build_config() {
#ifdef GC_WITH_CUDA
  const char* const cuda = GC_CUDA_VERSION;
#else
  const char* const cuda = "";
#endif
  return {{"version", GC_VERSION},
          {"torch", GC_BUILD_TORCH},
          {"cuda", cuda},
          {"arch_list", GC_ARCH_LIST},
          {"compiler", compiler_name()}};
}

}  // namespace gc
