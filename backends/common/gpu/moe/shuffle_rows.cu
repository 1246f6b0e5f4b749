// SPDX-License-Identifier: Apache-2.0
// shuffle_rows(x, dst2src_map) -> out: out[i] = x[dst2src_map[i]], zeros for an index out of range
#include "indices.h"

#if OPMUX_KERNEL
#include "rows.cuh"
#endif

namespace opmux::gpu {

struct Shuffle {
  const void* x;
  void* out;
  int64_t x_stride;  // strides and the width count bytes
  int64_t out_stride;
  int64_t width;
  int64_t source_rows;
  int64_t rows;
  Indices map;
};

void launch_shuffle_rows(const Shuffle& a, Stream stream);

#if OPMUX_KERNEL

constexpr int kShuffleThreads = 256;

template <int kBytes, int kUnroll>
__global__ void __launch_bounds__(kShuffleThreads)
    shuffle_rows_kernel(Shuffle a, Divider width, int64_t first_row, uint32_t words) {
  using W = typename Word<kBytes>::Type;
  wait_for_previous();
  let_next_start();
  const uint32_t first = blockIdx.x * (kShuffleThreads * kUnroll) + threadIdx.x;
  Split at[kUnroll];
  int64_t source[kUnroll];
  W word[kUnroll] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t index = first + u * kShuffleThreads;
    at[u] = width.split(index < words ? index : words - 1);
    source[u] = a.map.at(first_row + at[u].quotient);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const char* row = static_cast<const char*>(a.x) + source[u] * a.x_stride;
    if (source[u] >= 0 && source[u] < a.source_rows) {
      word[u] = reinterpret_cast<const W*>(row)[at[u].remainder];
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    char* row = static_cast<char*>(a.out) + (first_row + at[u].quotient) * a.out_stride;
    if (first + u * kShuffleThreads < words) {
      store_word(reinterpret_cast<W*>(row) + at[u].remainder, word[u]);
    }
  }
}

template <int kBytes>
void launch_shuffle_rows(const Shuffle& a, Stream stream) {
  const int64_t width = a.width / kBytes;
  const int64_t most = ((int64_t{1} << 31) - 1) / width;  // rows that 31 bits can count
  for (int64_t first = 0; first < a.rows; first += most) {
    const int64_t rows = a.rows - first < most ? a.rows - first : most;
    const int64_t words = rows * width;
    const auto run = [&](auto kernel, int unroll) {
      launch({"shuffle_rows", stream, ceil_div(words, kShuffleThreads * unroll), kShuffleThreads},
             kernel, a, Divider(width), first, static_cast<uint32_t>(words));
    };
    if (words >= 4 * resident_threads()) {
      run(shuffle_rows_kernel<kBytes, 4>, 4);
    } else {
      run(shuffle_rows_kernel<kBytes, 1>, 1);
    }
  }
}

void launch_shuffle_rows(const Shuffle& a, Stream stream) {
  const uint64_t all = static_cast<uint64_t>(a.width) | a.x_stride | a.out_stride |
                       reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out);
  if (all % 16 == 0) return launch_shuffle_rows<16>(a, stream);
  if (all % 4 == 0) return launch_shuffle_rows<4>(a, stream);
  if (all % 2 == 0) return launch_shuffle_rows<2>(a, stream);
  launch_shuffle_rows<1>(a, stream);
}

#endif

#if OPMUX_LAUNCHER
void shuffle_rows(const Tensor& x, const Tensor& dst2src_map, Tensor out) {
  constexpr const char* kOp = "shuffle_rows";
  check_same_device(kOp, x, dst2src_map, out);
  check_same_dtype(kOp, x, out);
  check(x.dim() == 2 && out.dim() == 2 && out.size(1) == x.size(1), kOp,
        "x and out must be rows of one width");
  const Indices map = indices_of(kOp, dst2src_map, out.size(0));
  check_last_dim_contiguous(kOp, x);
  check_last_dim_contiguous(kOp, out);
  const int64_t item = static_cast<int64_t>(x.element_size());
  check(x.size(1) < kMaxRow / item, kOp, "a row must have fewer than 2**31 bytes");
  const Shuffle a = {x.const_data_ptr(),
                     out.mutable_data_ptr(),
                     x.size(0) > 1 ? x.stride(0) * item : 0,
                     out.size(0) > 1 ? out.stride(0) * item : 0,
                     x.size(1) * item,
                     x.size(0),
                     out.size(0),
                     map};
  if (a.rows * a.width == 0) return;
  const Place place(kOp, x);
  launch_shuffle_rows(a, place.stream());
}
OPMUX_OP(shuffle_rows, shuffle_rows);
#endif

}  // namespace opmux::gpu
