#include "cpu/dispatch.h"

#include <ATen/Version.h>

#include <string>

namespace gc::cpu {

namespace {

const KernelSet* choose() {
  const std::string capability = at::get_cpu_capability();
  const KernelSet* chosen = nullptr;
  if (capability == "AVX512") chosen = avx512_kernels();
  if (capability == "AVX2") chosen = avx2_kernels();
  return chosen ? chosen : default_kernels();
}

}  // namespace

const KernelSet& kernel_set() {
  static const KernelSet* const chosen = choose();
  return *chosen;
}

}  // namespace gc::cpu
