// Memory for large outputs.
#pragma once

#include <ATen/ATen.h>

namespace gc::cpu {

// An uninitialised tensor, like at::empty. Large ones ask the system for huge pages: the C library maps blocks above
// 32 MiB anew for every tensor, and first writing to them then costs a fault per 4 KiB page, several times what the
// write itself costs. Measured on 2 cores (Linux 6.18, huge pages at "madvise"): filling 69 MB takes 40 ms, with huge
// pages 8.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace gc::cpu
