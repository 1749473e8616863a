// Memory for large outputs.
#pragma once

#include <ATen/ATen.h>

namespace gc::cpu {

// An uninitialised tensor, like at::empty. The C library maps a block above 32 MiB anew for every tensor, and may do so
// for smaller ones; first writing to it costs a fault per 4 KiB page, several times what the write itself costs. Large
// outputs ask the system for huge pages instead, one after the other, for as long as these come quickly.
//
// Measured in a virtual machine (AMD EPYC, Linux 6.18, huge pages at "madvise"), for 2 MiB: 512 pages of 4 KiB take
// 1,000 us; a huge page 87 us; a huge page that the guest had handed back to its host (free page reporting) 4,600 us.
// The last are the ones that hurt: an output of 34 MB on them takes 74 ms, on small pages, for which there mostly is
// memory that the guest still has, 16, and on huge pages 5. Nothing tells them apart but the time that they take, and
// the kernel hands out its own first. So each huge page is touched here and timed, and the first slow one ends the
// asking: the rest of the tensor lies on the pages it would have had in eager PyTorch.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace gc::cpu
