// The kernels for the instruction set that the compiler assumes anyway: SSE2 on x86-64, NEON on AArch64.
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#include "cpu/simd/table.h"

const gc::cpu::KernelSet* gc::cpu::default_kernels() { return &kKernelSet; }
