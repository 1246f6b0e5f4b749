// SPDX-License-Identifier: Apache-2.0
// What the concatenations of multi-head latent attention share: out[t, h] = concat(a[t, h], b[t,
// h]), bit for bit.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL
#include "rows.cuh"
#endif

namespace opmux::gpu {

struct Heads {
  void* data;
  int64_t token_stride;  // strides and widths count bytes
  int64_t head_stride;   // 0: one for all heads
  int64_t width;
};
struct Concat {
  Heads a, b, out;
  int64_t tokens, heads;
};
using LaunchConcat = void(const Concat&, Stream);

#if OPMUX_KERNEL

constexpr int kConcatThreads = 256;

template <int kBytes, int kUnroll>
__global__ void __launch_bounds__(kConcatThreads)
    concat_kernel(Concat c, Divider width, Divider heads, int64_t first_token, uint32_t words) {
  using W = typename Word<kBytes>::Type;
  wait_for_previous();
  let_next_start();
  const uint32_t first = blockIdx.x * (kConcatThreads * kUnroll) + threadIdx.x;
  W word[kUnroll];
  W* to[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t index = first + u * kConcatThreads;
    const Split at = width.split(index < words ? index : words - 1);
    const Split row = heads.split(at.quotient);
    const int64_t token = first_token + row.quotient;
    const int64_t byte = static_cast<int64_t>(at.remainder) * kBytes;
    const auto place = [&](const Heads& h, int64_t column) {
      char* start = static_cast<char*>(h.data) + token * h.token_stride;
      return reinterpret_cast<W*>(start + row.remainder * h.head_stride + column);
    };
    word[u] = *(byte < c.a.width ? place(c.a, byte) : place(c.b, byte - c.a.width));
    to[u] = place(c.out, byte);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kConcatThreads < words) store_word(to[u], word[u]);
  }
}

template <int kBytes>
void launch_concat_words(const char* op, const Concat& c, Stream stream) {
  const int64_t width = c.out.width / kBytes;
  const int64_t most = ((int64_t{1} << 31) - 1) / (width * c.heads);  // tokens that 31 bits count
  for (int64_t first = 0; first < c.tokens; first += most) {
    const int64_t words = (c.tokens - first < most ? c.tokens - first : most) * c.heads * width;
    const auto run = [&](auto kernel, int unroll) {
      launch({op, stream, ceil_div(words, kConcatThreads * unroll), kConcatThreads}, kernel, c,
             Divider(width), Divider(c.heads), first, static_cast<uint32_t>(words));
    };
    if (words >= 4 * resident_threads()) {
      run(concat_kernel<kBytes, 4>, 4);
    } else {
      run(concat_kernel<kBytes, 1>, 1);
    }
  }
}

inline void launch_concat(const char* op, const Concat& c, Stream stream) {
  uint64_t all = 0;
  for (const Heads* h : {&c.a, &c.b, &c.out}) {
    all |= reinterpret_cast<uintptr_t>(h->data) | static_cast<uint64_t>(h->token_stride) |
           static_cast<uint64_t>(h->head_stride) | static_cast<uint64_t>(h->width);
  }
  if (all % 16 == 0) return launch_concat_words<16>(op, c, stream);
  if (all % 4 == 0) return launch_concat_words<4>(op, c, stream);
  launch_concat_words<2>(op, c, stream);
}

#else

inline Heads heads_of(const char* op, const Operand& operand) {
  const Tensor& t = operand.tensor;
  check(t.dim() == 3, op, "tensors must have three dimensions");
  check_last_dim_contiguous(op, t);
  const int64_t item = static_cast<int64_t>(t.element_size());
  return {operand.data, t.size(0) > 1 ? t.stride(0) * item : 0,
          t.size(1) > 1 ? t.stride(1) * item : 0, t.size(2) * item};
}

// b has the heads of a, or one for all.
inline void concat(const char* op, LaunchConcat* launch, const Tensor& a, const Tensor& b,
                   const Tensor& out, bool one_b) {
  check_same_device(op, out, a, b);
  check_same_dtype(op, out, a, b);
  float_type(op, out);
  const Concat c = {heads_of(op, reads(a)), heads_of(op, reads(b)), heads_of(op, writes(out)),
                    out.size(0), out.size(1)};
  check(a.size(0) == c.tokens && b.size(0) == c.tokens, op, "tensors must have the same tokens");
  check(a.size(1) == c.heads && b.size(1) == (one_b ? 1 : c.heads), op,
        "tensors must have the same heads");
  check(c.a.width + c.b.width == c.out.width, op, "widths must add up");
  check(c.heads == 0 || c.out.width < kMaxRow / c.heads, op,
        "a token must have fewer than 2**31 bytes");
  if (c.tokens * c.heads * c.out.width == 0) return;
  const Place place(op, out);
  launch(c, place.stream());
}

#endif

}  // namespace opmux::gpu
