// The stages of the vector unit's fused pass over one row tile, from the function on: x is float[columns][Rows], a
// column's rows adjacent, as in the vector scratchpad. Each stage is one loop, so that compilers vectorise it; hardware
// has them in series.
#pragma once

#include "lockstep/vector_ops.hpp"

namespace lockstep {

template <int Rows>
struct FusedPass {
  // x = float(word) for words that hold int32 patterns.
  static void convert_words(const float* __restrict words, std::size_t columns, float* __restrict x) {
    for (std::size_t i = 0; i < columns * Rows; ++i)
      x[i] = static_cast<float>(static_cast<std::int32_t>(bits_of(words[i])));
  }

  // One value per column, the same for every lane, or one for each element.
  static void multiply_columns(std::size_t columns, const float* __restrict column, float* __restrict x) {
    for (std::size_t j = 0; j < columns; ++j)
#pragma GCC unroll 1
      for (int r = 0; r < Rows; ++r) x[j * Rows + r] *= column[j];
  }
  static void multiply_elements(std::size_t columns, const float* __restrict y, float* __restrict x) {
    for (std::size_t i = 0; i < columns * Rows; ++i) x[i] *= y[i];
  }

  // Functions.
  static void rectify(std::size_t columns, float* __restrict x) {
    for (std::size_t i = 0; i < columns * Rows; ++i) x[i] = relu(x[i]);
  }
  // x = clamp(x); peak[r] = the greatest exponent of 2^x in lane r, starting from what stands there.
  [[gnu::noinline]] static void score(std::size_t columns, float* __restrict x, std::int32_t* __restrict peak) {
    std::int32_t greatest[Rows];
    for (int r = 0; r < Rows; ++r) greatest[r] = peak[r];
    for (std::size_t j = 0; j < columns; ++j)
      for (int r = 0; r < Rows; ++r) {
        const float z = clamp_score(x[j * Rows + r]);
        const float magic = 393216.0f;  // 1.5 * 2^18: steps of 1/32
        const std::int32_t integer = static_cast<std::int32_t>(bits_of(z + magic) - bits_of(magic));
        const std::int32_t n = z == z ? integer >> 5 : 0;
        x[j * Rows + r] = z;
        greatest[r] = n > greatest[r] ? n : greatest[r];
      }
    for (int r = 0; r < Rows; ++r) peak[r] = greatest[r];
  }
  // x = -infinity where lane r, which is at position first + r, does not see column j: it sees columns up to its own,
  // with a window the last `window` of them.
  [[gnu::noinline]] static void hide(std::size_t columns, std::int32_t first, std::int32_t window,
                                     float* __restrict x) {
    const std::int32_t n = static_cast<std::int32_t>(columns);
    if (first >= n - 1 && (!window || first + Rows <= window)) return;  // all are visible
    const std::int32_t reach = window ? window : n + Rows + (first > 0 ? first : 0);
    for (std::int32_t j = 0; j < n; ++j)
      for (std::int32_t r = 0; r < Rows; ++r) {
        const std::int32_t distance = first + r - j;
        const bool visible = distance >= 0 && distance < reach;
        x[j * Rows + r] = visible ? x[j * Rows + r] : float_of(kSign | kInfinity);
      }
  }
  // x = 2^clamp(x) * 2^-peak, +0 for -infinity.
  [[gnu::noinline]] static void exponential(const Table& table, std::size_t columns,
                                            const std::int32_t* __restrict peak, float* __restrict x) {
    constexpr std::size_t kPiece = Rows * (Rows < 16 ? 32 : 4);  // whole columns, and a multiple of kLookups
    alignas(64) std::int32_t n[kPiece] = {};
    alignas(64) float m[kPiece] = {};
    for (std::size_t begin = 0; begin < columns * Rows; begin += kPiece) {
      const std::size_t count = columns * Rows - begin < kPiece ? columns * Rows - begin : kPiece;
      float* __restrict z = x + begin;
      for (std::size_t i = 0; i < count; ++i) {
        const Address at = address(table, clamp_score(z[i]));
        n[i] = at.integer;
        m[i] = at.d;
      }
      segments<32>(table, count, n, m, m);
      for (std::size_t i = 0; i < count; ++i) {
        const float scaled = scale2(m[i], (n[i] >> 5) - peak[i % Rows]);
        z[i] = bits_of(z[i]) == (kSign | kInfinity) ? 0.0f : scaled;
      }
    }
  }

  // Reductions.
  static void sum(std::size_t columns, const float* __restrict x, float* __restrict out) {
    float partial[kPartialSums][Rows] = {};
    for (std::size_t j = 0; j < columns; ++j)
      for (int r = 0; r < Rows; ++r) partial[j % kPartialSums][r] += x[j * Rows + r];
    for (std::size_t half = kPartialSums / 2; half > 0; half /= 2)
      for (std::size_t j = 0; j < half; ++j)
        for (int r = 0; r < Rows; ++r) partial[j][r] += partial[j + half][r];
    for (int r = 0; r < Rows; ++r) out[r] = partial[0][r] + 0.0f;
  }
  // greatest[r] = the greatest magnitude of lane r as an integer, starting from what stands there.
  static void absolute_maximum(std::size_t columns, const float* __restrict x, std::int32_t* __restrict greatest) {
    std::uint32_t most[Rows] = {};
    for (std::size_t j = 0; j < columns; ++j)
      for (int r = 0; r < Rows; ++r) {
        const std::uint32_t magnitude = magnitude_bits(x[j * Rows + r]);
        most[r] = magnitude > most[r] ? magnitude : most[r];
      }
    for (int r = 0; r < Rows; ++r) {
      const std::int32_t canonical = static_cast<std::int32_t>(bits_of(canonical_magnitude(most[r])));
      greatest[r] = canonical > greatest[r] ? canonical : greatest[r];
    }
  }

  static void round(std::size_t columns, const float* __restrict x, std::uint8_t* __restrict out) {
    for (std::size_t i = 0; i < columns * Rows; ++i) out[i] = round_to_int8bits(x[i]);
  }
};

}  // namespace lockstep
