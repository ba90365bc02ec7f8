// Arguments that every kernel reads from the device, so that no call waits for it and a captured graph sees new values.
#pragma once

#include "cuda/device.cuh"

namespace diffgap {

// One int64 per sample.
struct Index {
  const int64_t* data;  // or null
  int64_t stride;

  DIFFGAP_HD int64_t operator[](int64_t sample) const { return data[sample * stride]; }
};

// Rows of coefficients in float64 or float32.
struct Table {
  const void* data;
  bool is_float64;
  int64_t rows;
  int columns;

  // A row that is not there gives NaN: the index is known to the device alone, and a trap would end the CUDA context.
  DIFFGAP_HD bool has(int64_t row) const { return 0 <= row && row < rows; }

  DIFFGAP_HD float at(int64_t row, int column) const {
    const int64_t i = row * columns + column;
    return is_float64 ? static_cast<float>(static_cast<const double*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

}  // namespace diffgap
