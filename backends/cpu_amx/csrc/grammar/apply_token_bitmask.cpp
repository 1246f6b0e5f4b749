// SPDX-License-Identifier: Apache-2.0
// apply_token_bitmask(logits, bitmask, indices): in place, -inf where the bit of a token is 0
#include "kernel.h"

#if OPMUX_LAUNCHER
#include <algorithm>
#endif

namespace opmux::cpu {
namespace {

// `size` logits of one row, the first of which belongs to bit 0 of words[0].
using MaskLogits = void(const uint32_t* words, void* logits, int64_t size);

#if OPMUX_KERNEL

// Logits are moved as bits: those that stay keep theirs, NaN included.
struct Bits32 {
  using Type = uint32_t;
  using Register = Type __attribute__((vector_size(kLanes * 4)));
};
struct Bits16 {
  using Type = uint16_t;
  using Register = Type __attribute__((vector_size(kLanes * 4)));
};
template <class T>
struct Bits;
template <>
struct Bits<float> : Bits32 {
  static constexpr Type kMinusInf = 0xff800000;
};
template <>
struct Bits<bfloat16> : Bits16 {
  static constexpr Type kMinusInf = 0xff80;
};
template <>
struct Bits<float16> : Bits16 {
  static constexpr Type kMinusInf = 0xfc00;
};

// Writes -inf to those of 32 logits whose bit is set.
template <class B>
OPMUX_INLINE void forbid(uint32_t bits, typename B::Type* logits) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(typename B::Type) == 4) {
    const __m512i fill = _mm512_set1_epi32(static_cast<int>(B::kMinusInf));
    _mm512_mask_storeu_epi32(logits, static_cast<__mmask16>(bits), fill);
    _mm512_mask_storeu_epi32(logits + 16, static_cast<__mmask16>(bits >> 16), fill);
  } else {
    _mm512_mask_storeu_epi16(logits, bits, _mm512_set1_epi16(static_cast<short>(B::kMinusInf)));
  }
#else
  using Type = typename B::Type;
  using Register = typename B::Register;
  constexpr int kStep = static_cast<int>(sizeof(Register) / sizeof(Type));
  Register select = {};
  for (int i = 0; i < kStep; ++i) select[i] = static_cast<Type>(1u << i);
  for (int i = 0; i < 32; i += kStep) {
    const Register spread = static_cast<Type>(bits >> i) - Register{};
    const Register hit = (Register)((spread & select) == select);
    Register value;
    __builtin_memcpy(&value, logits + i, sizeof value);
    value = (value & ~hit) | (B::kMinusInf & hit);
    __builtin_memcpy(logits + i, &value, sizeof value);
  }
#endif
}

template <class T>
void mask_logits(const uint32_t* words, void* logits, int64_t size) {
  auto* row = static_cast<typename Bits<T>::Type*>(logits);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const uint32_t forbidden = ~words[i / 32];
    if (forbidden != 0) forbid<Bits<T>>(forbidden, row + i);
  }
  for (; i < size; ++i) {
    if ((words[i / 32] >> (i % 32) & 1) == 0) row[i] = Bits<T>::kMinusInf;
  }
}

#endif

OPMUX_FLOAT_KERNELS(mask_logits_kernels, MaskLogits, mask_logits);

#if OPMUX_LAUNCHER

int64_t row_index(const Tensor& indices, IndexType type, int64_t i) {
  const void* data = indices.const_data_ptr();
  i *= indices.stride(0);
  return type == IndexType::kInt32 ? static_cast<const int32_t*>(data)[i]
                                   : static_cast<const int64_t*>(data)[i];
}

void apply_token_bitmask(Tensor logits, const Tensor& bitmask,
                         const std::optional<Tensor>& indices) {
  constexpr const char* kOp = "apply_token_bitmask";
  check_same_device(kOp, logits, bitmask);
  check(logits.dim() == 2 && bitmask.dim() == 2, kOp, "logits and bitmask have two dimensions");
  check_last_dim_contiguous(kOp, logits);
  check_last_dim_contiguous(kOp, bitmask);
  const int64_t batch = logits.size(0), size = logits.size(1);
  check(dtype_of(bitmask) == aoti_torch_dtype_int32(), kOp, "bitmask must be int32");
  check(bitmask.size(0) == batch && bitmask.size(1) >= (size + 31) / 32, kOp,
        "bitmask must have a bit for each logit");
  MaskLogits* kernel = mask_logits_kernels.get(float_type(kOp, logits));

  int64_t rows = batch;
  IndexType type = IndexType::kInt32;
  if (indices.has_value()) {
    check_same_device(kOp, logits, *indices);
    check(indices->dim() == 1, kOp, "indices must have one dimension");
    type = index_type(kOp, *indices);
    rows = indices->size(0);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = row_index(*indices, type, i);
      check(b >= 0 && b < batch, kOp, "index out of range");
    }
  }

  // Pieces of a row, so that a single row has work for all threads.
  constexpr int64_t kPiece = 16 * 1024;
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  const int64_t item = static_cast<int64_t>(logits.element_size());
  const int64_t logits_stride = logits.stride(0), words_stride = bitmask.stride(0);
  char* to = static_cast<char*>(logits.mutable_data_ptr());
  const uint32_t* words = static_cast<const uint32_t*>(bitmask.const_data_ptr());
  parallel(rows * pieces, std::min(size, kPiece) * item, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = indices.has_value() ? row_index(*indices, type, i / pieces) : i / pieces;
      const int64_t column = i % pieces * kPiece;
      kernel(words + b * words_stride + column / 32, to + (b * logits_stride + column) * item,
             std::min(size - column, kPiece));
    }
  });
}
OPMUX_OP(apply_token_bitmask, apply_token_bitmask);

#endif

}  // namespace
}  // namespace opmux::cpu
