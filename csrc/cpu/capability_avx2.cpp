// The kernels for AVX2, chosen at run time.
//
// Every file of an extension is compiled with the same flags, so a pragma sets the instruction set. g++ before 13
// expands macros before it obeys the pragma: the feature macros that the headers ask for are defined here, to the
// values that the compiler itself gives them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define __SSE3__ 1
#define __SSSE3__ 1
#define __SSE4_1__ 1
#define __SSE4_2__ 1
#define __AVX__ 1
#define __AVX2__ 1
#define __FMA__ 1
#define __F16C__ 1
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#include "cpu/simd/table.h"

const gc::cpu::KernelSet* gc::cpu::avx2_kernels() { return &kKernelSet; }
#else
#include "cpu/kernels.h"

const gc::cpu::KernelSet* gc::cpu::avx2_kernels() { return nullptr; }
#endif
