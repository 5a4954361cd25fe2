// Walking tensors of rank <= 8 with any strides, a row of the last axis at a time.
#pragma once

#include <array>
#include <cstdint>

#include "program/program.h"

namespace edgeformer {

using Strides = std::array<int64_t, kMaxRank>;

inline Strides contiguous(const Tensor& t) {
  Strides s{};
  int64_t step = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    s[i] = step;
    step *= t.shape[i];
  }
  return s;
}

// Strides of `t` broadcast to the shape of `out`: 0 along broadcast axes. Trailing axes are aligned.
inline Strides broadcast_strides(const Tensor& t, const Tensor& out) {
  const Strides own = contiguous(t);
  Strides s{};
  for (int i = 0; i < t.rank; ++i) {
    const int axis = out.rank - t.rank + i;
    s[axis] = t.shape[i] == 1 ? 0 : own[i];
  }
  return s;
}

// Whether `t` broadcasts to `out`: every axis is 1 or out's.
inline bool broadcasts(const Tensor& t, const Tensor& out) {
  if (t.rank > out.rank) return false;
  for (int i = 0; i < t.rank; ++i) {
    const int64_t d = out.shape[out.rank - t.rank + i];
    if (t.shape[i] != d && t.shape[i] != 1) return false;
  }
  return true;
}

// For every row [begin, end) of `out` (all axes but the last, in order): f(row, offsets of the N operands at its
// start).
template <int N, class F>
void for_rows(const Tensor& out, const std::array<Strides, N>& strides, int64_t begin, int64_t end, F f) {
  const int last = out.rank - 1;
  std::array<int64_t, kMaxRank> index{};
  std::array<int64_t, N> offset{};
  int64_t rest = begin;
  for (int axis = last - 1; axis >= 0; --axis) {
    index[axis] = rest % out.shape[axis];
    rest /= out.shape[axis];
    for (int i = 0; i < N; ++i) offset[i] += index[axis] * strides[i][axis];
  }
  for (int64_t row = begin; row < end; ++row) {
    f(row, offset);
    for (int axis = last - 1; axis >= 0; --axis) {
      for (int i = 0; i < N; ++i) offset[i] += strides[i][axis];
      if (++index[axis] < out.shape[axis]) break;
      for (int i = 0; i < N; ++i) offset[i] -= out.shape[axis] * strides[i][axis];
      index[axis] = 0;
    }
  }
}

}  // namespace edgeformer
