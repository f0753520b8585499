// The product of 8-bit integers with exact 32-bit sums: a few rows at a time against a packed panel of columns.
//
// A panel holds up to 64 columns, four bytes of depth together: byte i of group g of column c stands at
// (g * width + c) * 4 + i, width being the panel's columns rounded up to 16. A product reads it once from front to back.
#pragma once

#include <algorithm>

#include "lockstep/dot.hpp"

namespace lockstep {

constexpr std::size_t kPanelColumns = 64;
constexpr std::size_t kRowBlock = 6;  // rows whose sums stay in registers: 6 x 4 of 32

constexpr std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// Columns of the panel that begins at `column`, rounded up to whole vectors.
constexpr std::size_t panel_width(std::size_t columns, std::size_t column) {
  return std::min(kPanelColumns, round_up(columns - column, kVectorColumns));
}

// Bytes that `columns` columns of `depth` take when they are packed. The panel of `column` begins at column * depth,
// the depth rounded up to kGroup.
constexpr std::size_t packed_bytes(std::size_t columns, std::size_t depth) {
  return round_up(columns, kVectorColumns) * round_up(depth, kGroup);
}

// Packs the columns b[c][0 .. depth), rows of b lying `stride` bytes apart; every byte is combined with `flip`.
inline void pack_rows(const std::int8_t* __restrict b, std::size_t columns, std::size_t depth, std::size_t stride,
                      std::uint8_t flip, std::uint8_t* __restrict packed) {
  const std::size_t whole = depth / kGroup, groups = round_up(depth, kGroup) / kGroup;
  const std::uint32_t flips = flip * 0x01010101u;
  for (std::size_t column = 0; column < columns; column += kPanelColumns) {
    const std::size_t width = panel_width(columns, column);
    std::uint8_t* panel = packed + column * groups * kGroup;
    for (std::size_t c = 0; c < width; ++c) {
      const std::int8_t* row = b + (column + c) * stride;
      const bool there = column + c < columns;
      for (std::size_t g = 0; g < groups; ++g) {
        std::uint32_t bytes = 0;
        if (there && g < whole) std::memcpy(&bytes, row + g * kGroup, kGroup);
        if (there && g >= whole) std::memcpy(&bytes, row + g * kGroup, depth - g * kGroup);
        bytes ^= flips;
        std::memcpy(panel + (g * width + c) * kGroup, &bytes, kGroup);
      }
    }
  }
}

// Packs the columns b[0 .. depth)[c] of a row-major matrix whose rows lie `stride` bytes apart.
inline void pack_columns(const std::int8_t* __restrict b, std::size_t columns, std::size_t depth, std::size_t stride,
                         std::int8_t* __restrict packed) {
  static constexpr std::int8_t zeros[kPanelColumns] = {};
  const std::size_t groups = round_up(depth, kGroup) / kGroup;
  for (std::size_t column = 0; column < columns; column += kPanelColumns) {
    const std::size_t width = panel_width(columns, column), there = std::min(width, columns - column);
    std::int8_t* panel = packed + column * groups * kGroup;
    for (std::size_t g = 0; g < groups; ++g) {
      const std::int8_t* row[kGroup];
      for (std::size_t i = 0; i < kGroup; ++i)
        row[i] = g * kGroup + i < depth ? b + (g * kGroup + i) * stride + column : zeros;
      std::int8_t* __restrict out = panel + g * width * kGroup;
      for (std::size_t c = 0; c < there; ++c)
        for (std::size_t i = 0; i < kGroup; ++i) out[c * kGroup + i] = row[i][c];
    }
  }
}

template <class Packed, int Rows, int Vectors>
[[gnu::noinline]] void multiply_block(const Packed* __restrict panel, std::size_t groups, const Opposite<Packed>* __restrict a,
                           std::size_t stride, std::int32_t* __restrict out, std::size_t out_stride) {
  using D = Dot<Packed>;
  Sums sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sums[r][v] = D::zero();
  for (std::size_t g = 0; g < groups; ++g) {
    typename D::Left left[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) left[v] = D::load(panel + (g * Vectors + v) * kVectorColumns * kGroup);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename D::Right right = D::broadcast(a + r * stride + g * kGroup);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = D::add(sums[r][v], left[v], right);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) D::store(out + r * out_stride + v * kVectorColumns, sums[r][v]);
}

template <class Packed, int Rows>
inline void multiply_vectors(const Packed* panel, std::size_t width, std::size_t groups, const Opposite<Packed>* a,
                             std::size_t stride, std::int32_t* out, std::size_t out_stride) {
  switch (width / kVectorColumns) {
    case 1: return multiply_block<Packed, Rows, 1>(panel, groups, a, stride, out, out_stride);
    case 2: return multiply_block<Packed, Rows, 2>(panel, groups, a, stride, out, out_stride);
    case 3: return multiply_block<Packed, Rows, 3>(panel, groups, a, stride, out, out_stride);
    default: return multiply_block<Packed, Rows, 4>(panel, groups, a, stride, out, out_stride);
  }
}

// out[r][c] = sum over the groups of a[r] . column c of the panel, modulo 2^32, for 1 to kRowBlock rows. a's rows lie
// `stride` bytes apart and are readable over whole groups; out has room for `width` columns a row.
template <class Packed>
inline void multiply_panel(const Packed* panel, std::size_t width, std::size_t groups, const Opposite<Packed>* a,
                           std::size_t rows, std::size_t stride, std::int32_t* out, std::size_t out_stride) {
  switch (rows) {
    case 1: return multiply_vectors<Packed, 1>(panel, width, groups, a, stride, out, out_stride);
    case 2: return multiply_vectors<Packed, 2>(panel, width, groups, a, stride, out, out_stride);
    case 3: return multiply_vectors<Packed, 3>(panel, width, groups, a, stride, out, out_stride);
    case 4: return multiply_vectors<Packed, 4>(panel, width, groups, a, stride, out, out_stride);
    case 5: return multiply_vectors<Packed, 5>(panel, width, groups, a, stride, out, out_stride);
    default: return multiply_vectors<Packed, 6>(panel, width, groups, a, stride, out, out_stride);
  }
}

}  // namespace lockstep
