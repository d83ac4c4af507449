#pragma once

#include <cmath>

// In place of src's, whose functions are instructions of a GPU.

namespace flash_mla::ptx {

/// Off by 1 ulp, up and down in turn: a GPU's is at most.
inline float reciprocal_approx(float x) {
  static bool is_below = false;
  is_below = !is_below;
  return std::nextafter(1.0F / x, is_below ? 0.0F : INFINITY);
}

}  // namespace flash_mla::ptx
