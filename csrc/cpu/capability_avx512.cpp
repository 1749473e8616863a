// The kernels for AVX-512, chosen at run time. setup.py compiles this file with the flags of that instruction set and
// defines CPU_CAPABILITY, as PyTorch does for its own kernels; where the machine type has no AVX-512, it does neither.
#include "cpu/kernels.h"

#ifdef CPU_CAPABILITY
#include "cpu/simd/table.h"

const gc::cpu::KernelSet* gc::cpu::avx512_kernels() { return &kKernelSet; }
#else
const gc::cpu::KernelSet* gc::cpu::avx512_kernels() { return nullptr; }
#endif
