// Order-preserving integer keys: one signed comparison decides every dtype, maximum and minimum, and both NaN policies.
//
//   max over floats   -inf < ... < -0 < +0 < ... < +inf < NaN (propagate)
//   NaN ignored       every NaN shares the lowest key with padding
//   minimum           the same order over the mirrored values, so the NaN rules stay as they are
#pragma once

#include <cstdint>

#include "../common/platform.h"

namespace pyperf {

enum class ElementKind : int { floating, signed_integer, unsigned_integer, boolean };

// Key is the signed integer of the dtype's width. Built on the host, passed to kernels by value.
template <class Key>
struct OrderedKey {
  Key pre;         // xor before ordering: mirrors the values (minimum), moves unsigned into signed range
  Key float_mask;  // low bits to flip where the sign is set (floats), 0 for integers
  Key infinity;    // magnitudes above are NaN; the largest key for integers, so that none is
  Key nan;         // the key of every NaN
  Key empty_bits;  // bits stored where a window holds no value
  Key top_bits;    // bits stored for the highest key: the canonical NaN, or the integer itself

  static constexpr int kSignShift = 8 * int(sizeof(Key)) - 1;
  static constexpr Key kLowest = Key(Key(1) << (kSignShift - 1)) * -2;  // also the key of padding
  static constexpr Key kHighest = Key(~kLowest);

  PYPERF_HD Key encode(Key bits) const {
    const Key b = Key(bits ^ pre);
    const Key key = Key(b ^ (Key(b >> kSignShift) & float_mask));
    return Key(b & kHighest) > infinity ? nan : key;
  }

  PYPERF_HD Key decode(Key key) const {
    const Key natural = Key(key ^ (Key(key >> kSignShift) & float_mask) ^ pre);
    return key == kLowest ? empty_bits : key == kHighest ? top_bits : natural;
  }

  // `infinity_bits`: the dtype's +inf for floats; unused for integers.
  static OrderedKey make(ElementKind kind, Key infinity_bits, bool minimum, bool ignore_nan) {
    OrderedKey k{};
    if (kind == ElementKind::floating) {
      const Key quiet_bit = Key(Key(infinity_bits & Key(-infinity_bits)) >> 1);  // the bit under the exponent field
      const Key canonical_nan = Key(infinity_bits | quiet_bit);
      k.pre = minimum ? kLowest : Key(0);
      k.float_mask = kHighest;
      k.infinity = infinity_bits;
      k.nan = ignore_nan ? kLowest : kHighest;
      k.empty_bits = ignore_nan ? canonical_nan : Key(infinity_bits ^ (minimum ? Key(0) : kLowest));
      k.top_bits = canonical_nan;
    } else {
      k.pre = Key((minimum ? Key(-1) : Key(0)) ^ (kind == ElementKind::signed_integer ? Key(0) : kLowest));
      k.float_mask = 0;
      k.infinity = kHighest;
      k.nan = kLowest;
      k.empty_bits = kind == ElementKind::boolean ? Key(minimum) : Key(kLowest ^ k.pre);
      k.top_bits = Key(kHighest ^ k.pre);
    }
    return k;
  }
};

}  // namespace pyperf
