// All operators, for one device.
#pragma once

#include <torch/library.h>

#include "ops/broadcast.h"
#include "ops/global_context.h"
#include "ops/pool.h"
#include "ops/tail.h"

namespace gc::ops {

// Calls enter(name, function) for each operator.
template <typename Device, typename Enter>
void each_operator(const Enter& enter) {
  enter("softmax_pool", softmax_pool<Device>);
  enter("softmax_pool_backward", softmax_pool_backward<Device>);
  enter("attention_pool", attention_pool<Device>);
  enter("attention_pool_backward", attention_pool_backward<Device>);
  enter("pixel_sum", pixel_sum<Device>);
  enter("broadcast", broadcast<Device>);
  enter("broadcast_mul_backward", broadcast_mul_backward<Device>);
  enter("broadcast_sums", broadcast_sums<Device>);
  enter("global_context", global_context<Device>);
  enter("global_context_kept", global_context_kept<Device>);
  enter("global_context_backward", global_context_backward<Device>);
}

template <typename Device>
void register_operators(torch::Library& library) {
  each_operator<Device>([&](const char* name, auto function) { library.impl(name, function); });
}

// Those of the residual tail.
template <typename Device, typename Enter>
void each_tail_operator(const Enter& enter) {
  enter("bn_context_add_relu", bn_context_add_relu<Device>);
  enter("bn_context_add_relu_training", bn_context_add_relu_training<Device>);
  enter("bn_context_add_relu_backward", bn_context_add_relu_backward<Device>);
}

template <typename Device>
void register_tail(torch::Library& library) {
  each_tail_operator<Device>([&](const char* name, auto function) { library.impl(name, function); });
}

}  // namespace gc::ops
