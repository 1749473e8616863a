// The shapes that every kernel is run on, each for a reason.
#pragma once

#include "feature_map.h"

namespace gc::drivers {

struct ShapeCase {
  Shape shape;
  int multiprocessors;  // of the device that is planned for: how far the work is split
  bool all_types;       // float64 and bfloat16 too
  int misaligned;       // elements that feature maps start off a 16-byte boundary
  const char* reason;
};

inline const std::vector<ShapeCase>& shape_cases() {
  static const std::vector<ShapeCase> cases = {
      {{1, 1, 1}, 4, true, 0, "the smallest: one element, and a warp with nothing for 31 threads"},
      {{2, 1, 49}, 4, false, 0, "C = 1: 7x7 pixels, odd, so that NCHW moves single elements"},
      {{3, 64, 1}, 4, false, 0, "S = 1: the softmax of one pixel is 1; NHWC rows of full vectors"},
      {{2, 3, 597}, 4, true, 0, "199x3: fewer channels than a vector, a pixel count without small factors, splits"},
      {{2, 33, 50}, 4, true, 0, "odd C: NHWC moves single elements, NCHW pairs; tails in both directions"},
      {{1, 64, 512}, 8, true, 0, "full vectors and no tail in either layout, several splits"},
      {{2, 40, 300}, 2, true, 0, "full vectors with tails in both directions, several tiles to a split"},
      {{1, 16, 1100}, 1, false, 0, "one or two splits of many tiles: both scratch buffers are used again"},
      {{3, 24, 196}, 1, false, 0, "more images than multiprocessors: nothing is split, nothing is merged"},
      {{1, 2, 9000}, 24, false, 0, "more splits than a warp merges at once"},
      {{1, 512, 49}, 4, false, 0, "c5 of a ResNet at 224 pixels, a quarter of its channels: tall tiles"},
      {{1, 2048, 21}, 4, false, 0, "C = 2048: all channels of a ResNet's last stage in one block"},
      {{1, 4104, 9}, 2, true, 0, "more channels than a block holds in NHWC (in every type) or in float64"},
      {{1, 8200, 8}, 2, false, 0, "more channels than a block holds in either layout"},
      {{2, 32, 64}, 4, true, 1, "feature maps one element off their alignment: single elements"},
      {{2, 32, 64}, 4, false, 2, "two elements off: half the bytes of a vector, or a quarter"},
  };
  return cases;
}

// For the newer paths, whose splits need not be equally long.
inline const ShapeCase& uneven_case() {
  static const ShapeCase uneven = {{2, 40, 1101}, 1, false, 0, "some splits have a tile more than others"};
  return uneven;
}

}  // namespace gc::drivers
