// What splines and affine couplings share between torch and kernels/.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "../kernels/common/storage.h"
#include "common/tensor.h"

namespace pyperf::coupling {

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Storage::f16;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    default: require(false, "coupling: tensors must be float16, bfloat16, float32 or float64");
  }
  return Storage::f32;
}

inline ScalarType logdet_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Where the elements of a tensor lie, or some of them.
struct Strided {
  char* data;
  Storage type;
  std::vector<int64_t> sizes, strides;

  Strided(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        type(storage_of(t)),
        sizes(t.sizes().begin(), t.sizes().end()),
        strides(t.strides().begin(), t.strides().end()) {}

  // Indices first, first + step, ... of a dimension.
  Strided part(int64_t dim, int64_t first, int64_t step, int64_t count) const {
    Strided some = *this;
    some.data += first * strides[dim] * storage_bytes(type);
    some.sizes[dim] = count, some.strides[dim] *= step;
    return some;
  }
  // Index i of the last dimension, which is gone.
  Strided of_last(int64_t i) const {
    Strided some = part(int64_t(sizes.size()) - 1, i, 1, 1);
    some.sizes.pop_back(), some.strides.pop_back();
    return some;
  }
};

// The channels that a coupling transforms: first, first + step, ... of a dimension, as many as the parameters have. The
// others pass.
struct Split {
  int64_t dim = -1, first = 0, step = 1, count = 0;

  Split() = default;
  // split: empty for all channels, or dim, first, step.
  Split(const Tensor& x, const Tensor& params, const std::vector<int64_t>& split) {
    require(params.dim() == x.dim() + 1, "coupling: params must have the dimensions of x and one more");
    if (split.empty()) return;
    require(split.size() == 3 && split[0] >= 0 && split[0] < x.dim(),
            "coupling: split must be a dimension of x, the first channel, and a step");
    dim = split[0], first = split[1], step = split[2], count = params.size(dim);
    const int64_t channels = x.size(dim);
    require(first >= 0 && first <= channels && step >= 1 && step <= std::max<int64_t>(1, channels) &&
                (count == 0 || (count - 1) * step < channels - first),
            "coupling: split must lie in x");
  }

  bool whole() const { return dim < 0; }
  Strided part_of(const Strided& t) const { return whole() ? t : t.part(dim, first, step, count); }
  // The shape of that part.
  std::vector<int64_t> shape(const Tensor& x) const {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    if (!whole()) sizes[dim] = count;
    return sizes;
  }

  void copy_others(const Tensor& from, const Tensor& to) const {
    if (whole()) return;
    const int64_t channels = from.size(dim), end = count ? first + (count - 1) * step + 1 : first;
    copy_some(from, to, 0, first, 1);
    copy_some(from, to, end, channels, 1);
    for (int64_t i = 1; i < step && count > 1; ++i) copy_some(from, to, first + i, end, step);
  }

 private:
  void copy_some(const Tensor& from, const Tensor& to, int64_t begin, int64_t end, int64_t step) const {
    if (begin >= end) return;
    const auto some = [&](const Tensor& t) {
      using torch::stable::detail::from;
      std::array<StableIValue, 5> stack{from(t), from(dim), from(std::optional<int64_t>(begin)),
                                        from(std::optional<int64_t>(end)), from(step)};
      TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::slice", "Tensor", stack.data(), TORCH_ABI_VERSION));
      return torch::stable::detail::to<Tensor>(stack[0]);
    };
    Tensor into = some(to);
    copy_(into, some(from));
  }
};

// The first `dims` sizes.
inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  return {t.sizes().begin(), t.sizes().begin() + dims};
}

}  // namespace pyperf::coupling
