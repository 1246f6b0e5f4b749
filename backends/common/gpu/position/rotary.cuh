// SPDX-License-Identifier: Apache-2.0
// Device parts that the rotary ops share: the angles of a token, and the pairs that they turn.
#pragma once

#include "position/rotary.h"

#if OPMUX_KERNEL

#include <type_traits>

#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {
namespace {

// kSize elements of C as floats; `from` is aligned to as much of them as one instruction loads.
template <class C, int kSize>
__device__ inline void load_floats(const C* from, float (&value)[kSize]) {
  constexpr int kPart = kSize < kFull<C> ? kSize : kFull<C>;
#pragma unroll
  for (int i = 0; i < kSize; i += kPart) {
    float part[kPart];
    widen(load<kPart>(from + i), part);
#pragma unroll
    for (int j = 0; j < kPart; ++j) value[i + j] = part[j];
  }
}

// One position a token.
class OnePosition {
 public:
  struct Rule {};

  __device__ OnePosition(const Rotary& a, const Rule&, int64_t token)
      : position_(a.positions.at(token)) {}

  __device__ bool valid(const Rotary& a) const {
    return position_ >= 0 && position_ < a.max_position;
  }
  // The angles of pairs [pair, pair + kSize).
  template <class C, int kSize>
  __device__ void angles(const Rotary& a, int64_t pair, float (&cos)[kSize],
                         float (&sin)[kSize]) const {
    const C* row = static_cast<const C*>(a.cos_sin) + position_ * a.cos_sin_stride + pair;
    load_floats(row, cos);
    load_floats(row + a.half, sin);
  }

 private:
  int64_t position_;
};

// Positions in time, height and width; the rule says which a pair takes.
class ThreePositions {
 public:
  struct Rule {
    int time, height, width;  // pairs of each
    bool interleaved;

    __device__ int row(int pair) const {
      if (!interleaved) return pair < time ? 0 : pair < time + height ? 1 : 2;
      const int row = pair % 3;
      return row == 1 && pair < 3 * height ? 1 : row == 2 && pair < 3 * width ? 2 : 0;
    }
  };

  __device__ ThreePositions(const Rotary& a, const Rule& rule, int64_t token)
      : rule_(rule),
        time_(a.positions.at(token)),
        height_(a.positions.at(a.position_stride + token)),
        width_(a.positions.at(2 * a.position_stride + token)) {}

  __device__ bool valid(const Rotary& a) const {
    const auto inside = [&](int64_t p) { return p >= 0 && p < a.max_position; };
    return inside(time_) && inside(height_) && inside(width_);
  }
  template <class C, int kSize>
  __device__ void angles(const Rotary& a, int64_t pair, float (&cos)[kSize],
                         float (&sin)[kSize]) const {
    const C* const table = static_cast<const C*>(a.cos_sin);
    const int first = static_cast<int>(pair);
    if (!rule_.interleaved && rule_.row(first) == rule_.row(first + kSize - 1)) {
      const C* row = table + at(rule_.row(first)) * a.cos_sin_stride + pair;
      load_floats(row, cos);
      load_floats(row + a.half, sin);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const C* row = table + at(rule_.row(first + i)) * a.cos_sin_stride + pair + i;
      cos[i] = to_float(row[0]);
      sin[i] = to_float(row[a.half]);
    }
  }

 private:
  __device__ int64_t at(int row) const { return row == 0 ? time_ : row == 1 ? height_ : width_; }

  const Rule& rule_;
  int64_t time_, height_, width_;
};

// Turns kSize pairs, which lie in two vectors: (low[i], high[i]) in the neox style, else (2i,
// 2i + 1) of both together.
template <bool kNeox, int kSize>
__device__ inline void turn(float (&low)[kSize], float (&high)[kSize], const float (&cos)[kSize],
                            const float (&sin)[kSize]) {
  float v[2 * kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    v[i] = low[i];
    v[kSize + i] = high[i];
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int a = kNeox ? i : 2 * i, b = kNeox ? kSize + i : 2 * i + 1;
    const float x = v[a], y = v[b];
    v[a] = fmaf(x, cos[i], -(y * sin[i]));  // one rounding order in every instantiation
    v[b] = fmaf(y, cos[i], x * sin[i]);
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    low[i] = v[i];
    high[i] = v[kSize + i];
  }
}

// The kSize pairs from `pair` on, in a head: where their first vector begins, and the distance of
// the second from it.
template <bool kNeox>
__device__ inline int64_t first_of(int64_t pair) {
  return kNeox ? pair : 2 * pair;
}
template <bool kNeox, int kSize>
__device__ inline int64_t second_after(const Rotary& a) {
  return kNeox ? a.half : kSize;
}

// How threads share the heads of a token. A group of lanes has some heads, as far apart as there
// are groups, and in each of them a lane has the same pairs, whose angles it loads once.
struct Sharing {
  Divider parts;    // blocks that share the groups of their tokens
  Divider threads;  // a token, in one block
  Divider lanes;    // threads a group
  int groups;       // of a token in one block
  int tokens;       // a block
};

// What a thread works on.
struct Share {
  int64_t token;
  int group;
  int lane;
  bool exists;  // the token; a group may be beyond the last one, too

  __device__ Share(const Sharing& s, int64_t tokens) {
    const Split block = s.parts.split(blockIdx.x);
    const Split in_block = s.threads.split(threadIdx.x);
    const Split in_token = s.lanes.split(in_block.remainder);
    const int index = static_cast<int>(in_block.quotient);
    token = static_cast<int64_t>(block.quotient) * s.tokens + index;
    group = static_cast<int>(block.remainder) * s.groups + static_cast<int>(in_token.quotient);
    lane = static_cast<int>(in_token.remainder);
    exists = index < s.tokens && token < tokens;
  }
};

// Small blocks: an H200 rotated 8192 x 72 heads of 128 in 75.6 us by blocks of 128 threads, in 77.7
// by 256 and in 80.3 by 384.
constexpr int kRotaryThreads = kBlockUnit;

struct SharedLaunch {
  Sharing by;
  int64_t blocks;
};

inline SharedLaunch share_groups(int64_t tokens, int64_t groups, int64_t lanes) {
  const int64_t parts = ceil_div(groups, kRotaryThreads / lanes), at_once = ceil_div(groups, parts);
  const int64_t in_block = kRotaryThreads / (at_once * lanes);
  return {{Divider(parts), Divider(at_once * lanes), Divider(lanes), static_cast<int>(at_once),
           static_cast<int>(in_block)},
          ceil_div(tokens, in_block) * parts};
}

// Whether the cache of angles allows vectors. Host code.
inline bool aligned_angles(const Rotary& a, int64_t item_bytes) {
  const int64_t item = a.cos_sin_float32 ? 4 : item_bytes;
  const uint64_t all =
      reinterpret_cast<uintptr_t>(a.cos_sin) | static_cast<uint64_t>(a.cos_sin_stride * item);
  return all % kVectorBytes == 0 && a.half * item_bytes % kVectorBytes == 0;
}

// Calls f(tag of the heads' type, tag of the angles', true_type for the neox style).
template <class F>
void for_rotary_types(const Rotary& a, const F& f) {
  for_float_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto styles = [&](auto angle) {
      a.is_neox ? f(tag, angle, std::true_type{}) : f(tag, angle, std::false_type{});
    };
    a.cos_sin_float32 ? styles(TypeTag<float>{}) : styles(TypeTag<T>{});
  });
}

}  // namespace
}  // namespace opmux::gpu

#endif
