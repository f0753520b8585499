// The product of 8-bit integers with exact 32-bit sums, blocked so that compilers find the dot-product instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lockstep {

constexpr std::size_t kDepthAlignment = 64;  // rows of operands are padded to this many bytes; weights with zeros
constexpr std::size_t kColumnBlock = 64;     // columns that are multiplied before the next rows are touched

constexpr std::size_t padded(std::size_t n) {
  return (n + kDepthAlignment - 1) / kDepthAlignment * kDepthAlignment;
}

// out[r][c] = sum over k of a[r][k] * b[c][k], for a few rows and columns whose sums stay in registers.
template <int Rows, int Columns>
inline void multiply_block(const std::uint8_t* __restrict a, const std::int8_t* __restrict b, std::size_t depth,
                           std::int32_t* __restrict out, std::size_t out_stride) {
  std::int32_t sum[Rows][Columns] = {};
  for (std::size_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[r][c] += static_cast<std::int32_t>(a[r * depth + k]) * b[c * depth + k];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) out[r * out_stride + c] = sum[r][c];
}

template <int Rows>
inline void multiply_rows(const std::uint8_t* a, const std::int8_t* b, std::size_t columns, std::size_t depth,
                          std::int32_t* out, std::size_t out_stride) {
  std::size_t c = 0;
  for (; c + 4 <= columns; c += 4) multiply_block<Rows, 4>(a, b + c * depth, depth, out + c, out_stride);
  for (; c < columns; ++c) multiply_block<Rows, 1>(a, b + c * depth, depth, out + c, out_stride);
}

// out[rows][columns] (row stride out_stride) = a[rows][depth] * b[columns][depth]^T, modulo 2^32 (-fwrapv).
inline void multiply(const std::uint8_t* a, std::size_t rows, const std::int8_t* b, std::size_t columns,
                     std::size_t depth, std::int32_t* out, std::size_t out_stride) {
  std::size_t r = 0;
  for (; r + 4 <= rows; r += 4) multiply_rows<4>(a + r * depth, b, columns, depth, out + r * out_stride, out_stride);
  for (; r + 2 <= rows; r += 2) multiply_rows<2>(a + r * depth, b, columns, depth, out + r * out_stride, out_stride);
  for (; r < rows; ++r) multiply_rows<1>(a + r * depth, b, columns, depth, out + r * out_stride, out_stride);
}

}  // namespace lockstep
