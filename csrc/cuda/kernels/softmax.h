// The online softmax: a running maximum m and a running sum z = sum exp(logit - m), rescaled when m grows.
// It gives NaN wherever PyTorch does: for a logit of +inf or NaN, and where every logit is -inf (z stays 0, and the
// caller's division gives NaN).
#pragma once

#include "numeric.h"

namespace gc {

template <typename A>
GC_DEVICE A minus_infinity() {
  return static_cast<A>(bit_cast<float>(0xff800000u));
}

// exp(logit - maximum). The difference is taken before the scaling by log2(e): it is exact where it matters, while a
// prescaled logit of 10^4 has already lost 10^-3. A maximum of -inf counts as 0, so that no -inf meets a -inf.
template <typename A>
GC_DEVICE A exp_below(A logit, A maximum) {
  const A base = maximum == minus_infinity<A>() ? A(0) : maximum;
  return port::exp2((logit - base) * A(1.4426950408889634074));
}

}  // namespace gc
