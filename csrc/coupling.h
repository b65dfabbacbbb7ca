// What splines and affine couplings share between torch and kernels/.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../kernels/common/other_channels.h"
#include "common/tensor.h"

namespace pyperf::coupling {

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
  // split: none for all channels, or dim, first, step. (Inductor's packages lose the type of an empty list.)
  Split(const Tensor& x, const Tensor& params, const std::optional<std::vector<int64_t>>& split) {
    require(params.dim() == x.dim() + 1, "coupling: params must have the dimensions of x and one more");
    if (!split) return;
    require(split->size() == 3 && split->front() >= 0 && split->front() < x.dim(),
            "coupling: split must be a dimension of x, the first channel, and a step");
    dim = (*split)[0], first = (*split)[1], step = (*split)[2], count = params.size(dim);
    const int64_t channels = x.size(dim);
    require(first >= 0 && first <= channels && step >= 1 && count <= channels - first &&
                (count <= 1 || step <= (channels - first - 1) / (count - 1)),
            "coupling: split must lie in x");
  }

  bool whole() const { return dim < 0; }
  Strided part_of(const Strided& t) const { return whole() ? t : t.part(dim, first, step, count); }
  Tensor view_of(const Tensor& t) const { return whole() ? t : sliced(t, dim, first, end(), step); }
  // The shape of that part.
  std::vector<int64_t> shape(const Tensor& x) const {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    if (!whole()) sizes[dim] = count;
    return sizes;
  }

  // Copies the channels that pass, or says how a kernel is to do it: one with `Backend::kCopiesOthers` does.
  template <class Backend>
  OtherChannels copy_or_plan_others(const Tensor& from, const Tensor& to) const {
    OtherChannels others{};
    if (whole()) return others;
    if (Backend::kCopiesOthers && count > 0 &&
        plan_other_channels(from.sizes().data(), int(from.dim()), int(dim), {first, step, count}, from.data_ptr(),
                            from.strides().data(), to.data_ptr(), to.strides().data(), storage_bytes(storage_of(from)),
                            others))
      return others;
    copy_others(from, to);
    return {};
  }

 private:
  int64_t end() const { return count ? first + (count - 1) * step + 1 : first; }

  void copy_others(const Tensor& from, const Tensor& to) const {
    copy_some(from, to, 0, first, 1);
    copy_some(from, to, end(), from.size(dim), 1);
    for (int64_t i = 1; i < step && count > 1; ++i) copy_some(from, to, first + i, end(), step);
  }
  void copy_some(const Tensor& from, const Tensor& to, int64_t begin, int64_t end, int64_t step) const {
    if (begin >= end) return;
    Tensor into = sliced(to, dim, begin, end, step);
    copy_(into, sliced(from, dim, begin, end, step));
  }
};

// y and the log-det, not yet filled.
inline std::tuple<Tensor, Tensor> empty_outputs(const Tensor& x, const Split& split, int64_t sample_dims) {
  const Tensor y = empty_as(x, x.scalar_type());
  std::vector<int64_t> sizes = split.shape(x);
  if (sample_dims < 0) return {y, empty(x, sizes, preserved_layout(x), logdet_type(x))};
  sizes.resize(sample_dims);
  return {y, contiguous_empty(x, sizes, logdet_type(x))};
}

}  // namespace pyperf::coupling
