// What every family needs between torch's stable ABI and raw kernels: checks, allocation, rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../../kernels/common/storage.h"
#include "../../kernels/common/strided_rows.h"

namespace pyperf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Last line of defence for memory safety; users meet the Python checks first. (STD_TORCH_CHECK would print a source
// path.)
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Storage::f16;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    default: require(false, "pyperf_dl: tensors must be float16, bfloat16, float32 or float64");
  }
  return Storage::f32;
}

// Order of the dimensions in memory, outermost first. A dense tensor keeps its own, anything else gets the logical one.
inline std::vector<int64_t> physical_layout(const Tensor& x) {
  std::vector<int64_t> layout(x.dim());
  std::iota(layout.begin(), layout.end(), int64_t(0));
  if (x.is_contiguous()) return layout;
  std::stable_sort(layout.begin(), layout.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  int64_t expected = 1;
  for (auto d = layout.rbegin(); d != layout.rend(); ++d) {
    if (x.size(*d) == 1) continue;
    if (x.stride(*d) != expected) {
      std::iota(layout.begin(), layout.end(), int64_t(0));
      return layout;
    }
    expected *= x.size(*d);
  }
  return layout;
}

// The same for a new tensor of the shape of `x` where x need not be dense: half of a channels_last tensor keeps its
// order too. Expanded tensors get the logical one.
inline std::vector<int64_t> preserved_layout(const Tensor& x) {
  std::vector<int64_t> layout(x.dim());
  std::iota(layout.begin(), layout.end(), int64_t(0));
  bool expanded = false;
  for (int64_t d = 0; d < x.dim(); ++d) expanded |= x.stride(d) == 0 && x.size(d) != 1;
  if (x.is_contiguous() || expanded) return layout;
  std::stable_sort(layout.begin(), layout.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  return layout;
}

// An uninitialised tensor on the device of `like`. Not by way of the dispatcher, which takes as long as a small kernel.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& layout,
                    ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (auto d = layout.rbegin(); d != layout.rend(); ++d) {
    strides[*d] = step;
    step *= std::max<int64_t>(sizes[*d], 1);
  }
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), type, device, index, &made));
  return Tensor(made);
}

// The first `dims` sizes.
inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  return {t.sizes().begin(), t.sizes().begin() + dims};
}

// New tensors: like `t`, which keeps the order of its dimensions in memory, and in logical order.
inline Tensor empty_as(const Tensor& t, ScalarType dtype) {
  return empty(t, sizes_of(t, t.dim()), preserved_layout(t), dtype);
}
inline Tensor contiguous_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> logical(sizes.size());
  std::iota(logical.begin(), logical.end(), int64_t(0));
  return empty(like, sizes, logical, dtype);
}

// Indices begin, begin + step, ... below `end` of a dimension, a view.
inline Tensor sliced(const Tensor& t, int64_t dim, int64_t begin, int64_t end, int64_t step = 1) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(t), from(dim), from(std::optional<int64_t>(begin)),
                                    from(std::optional<int64_t>(end)), from(step)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::slice", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A view of the given sizes, with stride 0 in place of 1s.
inline Tensor expanded(const Tensor& t, const std::vector<int64_t>& sizes) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(t), from(sizes), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The sum over some dimensions, which stay with size 1.
inline Tensor summed(const Tensor& t, const std::vector<int64_t>& dims, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(t), from(std::optional<std::vector<int64_t>>(dims)), from(true),
                                    from(std::optional<ScalarType>(dtype))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sum", "dim_IntList", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The rows along `dim` of tensors that agree in all other sizes. Neighbouring dimensions are merged where they can be;
// what does not fit kMaxRowDims afterwards is reported as `fits == false`, and the caller copies.
template <int N>
struct RowsAlong {
  static constexpr int64_t kFewestLanes = 16;  // of fewer neighbours, each is faster as a strided row of its own

  StridedRows<N> rows{};
  int64_t lanes = 1;
  std::array<int64_t, N> stride{};  // along dim
  bool fits = true;

  RowsAlong(const std::array<const Tensor*, N>& operands, int64_t dim) {
    struct Dim {
      int64_t size;
      std::array<int64_t, N> stride;
    };
    std::vector<Dim> dims, merged;
    dims.reserve(operands[0]->dim()), merged.reserve(operands[0]->dim());
    const Tensor& shape = *operands[0];
    // Of a tensor without elements the strides mean nothing, and a copy of it keeps them.
    const auto step = [&](int n, int64_t d) { return operands[n]->numel() == 0 ? 0 : operands[n]->stride(d); };
    for (int64_t d = 0; d < shape.dim(); ++d) {
      if (d == dim || shape.size(d) == 1) continue;
      Dim entry{shape.size(d), {}};
      for (int n = 0; n < N; ++n) entry.stride[n] = step(n, d);
      dims.push_back(entry);
    }
    for (int n = 0; n < N; ++n) stride[n] = step(n, dim);
    // Walk memory in the order of the last operand, which is the one written.
    std::stable_sort(dims.begin(), dims.end(),
                     [](const Dim& a, const Dim& b) { return a.stride[N - 1] > b.stride[N - 1]; });
    for (const Dim& d : dims) {
      const bool joins = !merged.empty() && [&] {
        for (int n = 0; n < N; ++n)
          if (merged.back().stride[n] != d.stride[n] * d.size) return false;
        return true;
      }();
      if (joins) {
        merged.back().size *= d.size;
        merged.back().stride = d.stride;
      } else {
        merged.push_back(d);
      }
    }
    const auto dense = [](const std::array<int64_t, N>& s) {
      return std::all_of(s.begin(), s.end(), [](int64_t v) { return v == 1; });
    };
    if (!merged.empty() && merged.back().size >= kFewestLanes && dense(merged.back().stride) && !dense(stride)) {
      lanes = merged.back().size;
      merged.pop_back();
    }
    rows.count = 1;
    for (const Dim& d : merged) rows.count *= d.size;
    fits = merged.size() <= size_t(kMaxRowDims);
    if (!fits) return;
    rows.dims = int(merged.size());
    for (int d = 0; d < rows.dims; ++d) {
      rows.size[d] = merged[d].size;
      for (int n = 0; n < N; ++n) rows.stride[n][d] = merged[d].stride[n];
    }
  }
};

// Every element of N operands of one shape, as rows of `n` elements along which each operand has one stride.
// Dimensions are merged where all operands allow it, across the border between samples and their elements too, so
// elements count from 0 to rows.count * n, and `sample_size` of them in a row belong to one sample.
//
// The first `sample_dims` dimensions index samples, in logical order. The others are walked as the last operand lies in
// memory, which is the logical order where that one is contiguous. What does not fit kMaxRowDims is reported as
// `fits == false`, and the caller copies.
template <int N>
struct ElementRuns {
  StridedRows<N> rows{};  // operand n of element e: rows.offsets(e / n)[n] + e % n * stride[n]
  int64_t n = 1;
  std::array<int64_t, N> stride{};
  int64_t samples = 1, sample_size = 1;
  bool fits = true;

  // strides[n]: of operand n, `dims` of them.
  ElementRuns(const int64_t* sizes, int64_t dims, const std::array<const int64_t*, N>& strides, int64_t sample_dims) {
    struct Dim {
      int64_t size;
      std::array<int64_t, N> stride;
    };
    std::vector<Dim> kept, merged;
    kept.reserve(dims), merged.reserve(dims);
    size_t of_samples = 0;
    for (int64_t d = 0; d < dims; ++d) {
      (d < sample_dims ? samples : sample_size) *= sizes[d];
      if (sizes[d] == 1) continue;
      Dim dim{sizes[d], {}};
      for (int k = 0; k < N; ++k) dim.stride[k] = strides[k][d];
      kept.push_back(dim);
      of_samples += d < sample_dims;
    }
    std::stable_sort(kept.begin() + of_samples, kept.end(),
                     [](const Dim& a, const Dim& b) { return a.stride[N - 1] > b.stride[N - 1]; });
    for (const Dim& dim : kept) {
      bool joins = !merged.empty();
      for (int k = 0; k < N && joins; ++k) joins = merged.back().stride[k] == dim.stride[k] * dim.size;
      if (joins) {
        merged.back().size *= dim.size;
        merged.back().stride = dim.stride;
      } else {
        merged.push_back(dim);
      }
    }
    if (samples * sample_size == 0) {  // strides mean nothing then, and a copy would keep them
      n = 0;
      rows.count = 1;
      return;
    }
    if (!merged.empty()) {
      n = merged.back().size;
      stride = merged.back().stride;
      merged.pop_back();
    }
    rows.count = 1;
    for (const Dim& dim : merged) rows.count *= dim.size;
    fits = merged.size() <= size_t(kMaxRowDims);
    if (!fits) return;
    rows.dims = int(merged.size());
    for (int d = 0; d < rows.dims; ++d) {
      rows.size[d] = merged[d].size;
      for (int k = 0; k < N; ++k) rows.stride[k][d] = merged[d].stride[k];
    }
  }

  int64_t elements() const { return rows.count * n; }
};

// The threads of torch, with scratch memory for each: parallel(count, grain, scratch_bytes, body(first, last,
// scratch)).
struct TorchThreads {
  template <class Body>
  void operator()(int64_t count, int64_t grain, int64_t scratch_bytes, const Body& body) const {
    const auto task = [&](int64_t first, int64_t last) {
      const std::unique_ptr<Aligned[]> scratch(new Aligned[scratch_bytes / sizeof(Aligned) + 1]);
      body(first, last, scratch[0].bytes);
    };
    if (count <= grain) {
      if (count > 0) task(0, count);
      return;
    }
    torch::stable::parallel_for(0, count, grain, task);
  }

 private:
  struct alignas(64) Aligned {
    char bytes[64];
  };
};

}  // namespace pyperf
