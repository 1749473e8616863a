// What the kernels of the residual tail's backward pass take (ops/tail.h), as args.h has it for the others. G is the
// gradient of the tail's output, g what the ReLU lets through of it.
#pragma once

#include "args.h"

namespace gc {

struct ResidualSumsArgs {
  Walk walk;
  const void* grad;    // T [N, C, S] or [N, S, C]: G
  const void* out;     // T like grad, or null: without a ReLU
  const void* y;       // T like grad, or null: without products
  const void* mean;    // A [C]        with products
  void* grad_in;       // T like grad out: g, with out
  void* sums;          // A [N, C] out
  void* product_sums;  // A [N, C] out, with products
  void* partial_sums;  // A [2, N, rows, C] workspace, splits > 1; rows = merged_rows(splits, group)
  unsigned* tickets;   // [N, chunks, merge_tickets(splits, group)], 0 before and after; splits > 1
};

}  // namespace gc
