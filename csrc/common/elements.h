// Element types of 16 bits. How they are widened and narrowed differs: cpu/tile.h for the host, cuda/unit.cuh for a GPU.
#pragma once

#include <cstdint>

namespace diffgap {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace diffgap
