// 16-bit floats as storage: read to float, round to nearest even on the way back. The same bits on CPU and CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/platform.h"

namespace pyperf {

PYPERF_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
PYPERF_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;

  PYPERF_HD static BFloat16 from(float value) {
    const uint32_t b = bits_from_float(value);
    if ((b & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0)};
    return {uint16_t((b + 0x7fffu + ((b >> 16) & 1)) >> 16)};
  }
  PYPERF_HD operator float() const { return float_from_bits(uint32_t(bits) << 16); }
};

struct Float16 {
  uint16_t bits;

  PYPERF_HD static Float16 from(float value) {
    const uint32_t b = bits_from_float(value);
    const uint32_t sign = (b >> 16) & 0x8000u;
    const uint32_t magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(0x7e00)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa and rounds to even
      const uint32_t aligned = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
      return {uint16_t(sign | aligned)};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1);
    return {uint16_t(sign | (rounded >> 13))};
  }
  PYPERF_HD operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float scaled = float_from_bits(magnitude << 13) * 5.192296858534828e33f;  // 2^112, exact
    return float_from_bits(sign | bits_from_float(scaled));
  }
};

// The type in which a gradient is accumulated, and the rounding back to storage.
template <class T>
struct Accumulate {
  using type = float;
  PYPERF_HD static T store(float value) { return T::from(value); }
};
template <>
struct Accumulate<float> {
  using type = float;
  PYPERF_HD static float store(float value) { return value; }
};
template <>
struct Accumulate<double> {
  using type = double;
  PYPERF_HD static double store(double value) { return value; }
};

}  // namespace pyperf
