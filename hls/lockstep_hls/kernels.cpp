// The contract operations on row-major arrays, for a host with ctypes. Buffers are the caller's, checked by kernels.py.
//
// Signed activations enter the product as q + 128, because the fast 8-bit instructions take unsigned times signed;
// 128 times the sum of each weight row is taken off again, exactly, in arithmetic modulo 2^32.
#include "lockstep/flush_to_zero.hpp"
#include "lockstep/matrix.hpp"
#include "lockstep/vector_ops.hpp"

using namespace lockstep;
using std::size_t;

namespace {

constexpr size_t kRowBlock = 16;
constexpr std::uint8_t kFlip = 0x80;

// x * prescale (or x) of one row, quantised to int8 bit patterns; returns the scale.
float quantise_row(const Table& recip_table, size_t n, const float* x, const float* prescale, std::uint8_t* out) {
  constexpr float step = 1.0f / 127.0f;
  if (prescale == nullptr) return requantise(recip_table, n, step, [x](size_t i) { return x[i]; }, out);
  return requantise(recip_table, n, step, [x, prescale](size_t i) { return x[i] * prescale[i]; }, out);
}

// 128 * the sum of a weight row.
std::int32_t offset_of(const std::int8_t* row, size_t n) {
  std::int32_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += row[i];
  return 128 * sum;
}

// Deals out the caller's workspace, which is zeroed; without one it only counts.
class Workspace {
 public:
  explicit Workspace(std::uint8_t* start) : start_(start) {}
  template <class T>
  T* take(size_t count) {
    T* result = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + used_);
    used_ += padded(count * sizeof(T));
    return result;
  }
  size_t used() const { return used_; }

 private:
  std::uint8_t* start_;
  size_t used_ = 0;
};

// Everything that attention keeps between its steps, for `rows` queries of size d over `keys` keys in tiles.
struct AttentionState {
  std::uint8_t *q, *p;
  std::int8_t *k, *v, *v_tile;
  float *c, *sk, *sv, *m, *e, *total, *sp;
  std::int32_t *k_offset, *scores, *n, *peak, *join, *product;

  AttentionState(Workspace& at, size_t rows, size_t keys, size_t d, size_t tile)
      : q(at.take<std::uint8_t>(rows * padded(d))), p(at.take<std::uint8_t>(kRowBlock * padded(tile))),
        k(at.take<std::int8_t>(keys * padded(d))), v(at.take<std::int8_t>(keys * d)),
        v_tile(at.take<std::int8_t>(d * padded(tile))), c(at.take<float>(rows)), sk(at.take<float>(keys)),
        sv(at.take<float>(keys)), m(at.take<float>(tile)), e(at.take<float>(tile)), total(at.take<float>(rows)),
        sp(at.take<float>(kRowBlock)), k_offset(at.take<std::int32_t>(keys)),
        scores(at.take<std::int32_t>(kRowBlock * tile)), n(at.take<std::int32_t>(tile)),
        peak(at.take<std::int32_t>(rows)), join(at.take<std::int32_t>(kRowBlock)),
        product(at.take<std::int32_t>(kRowBlock * d)) {}
};

struct AttentionShape {
  size_t rows, keys, d, tile;
};

// Scores of one query over one tile become probabilities p with scale sp; total and out move to the new peak.
void softmax_row(const Table& exp2_table, const Table& recip_table, const AttentionState& s, size_t row, size_t slot,
                 size_t first, size_t count, const std::uint8_t* mask, size_t d, size_t tile, float* out) {
  const float* __restrict sv = s.sv + first;
  float* __restrict m = s.m;
  float* __restrict e = s.e;
  std::int32_t* __restrict n = s.n;
  exp2_scores(exp2_table, count, s.scores + slot * tile, s.k_offset + first, s.sk + first, s.c[row], m, n);
  if (mask != nullptr)
    for (size_t j = 0; j < count; ++j) n[j] = mask[j] ? n[j] : kMaskedExponent;
  std::int32_t tile_peak = n[0];
  for (size_t j = 0; j < count; ++j) tile_peak = n[j] > tile_peak ? n[j] : tile_peak;
  for (size_t j = 0; j < count; ++j) e[j] = scale2(m[j], n[j] - tile_peak);
  const float sum = rowsum(count, [e](size_t j) { return e[j]; });
  s.sp[slot] = requantise(recip_table, count, 1.0f / 255.0f, [e, sv](size_t j) { return e[j] * sv[j]; },
                          s.p + slot * padded(count));

  const std::int32_t peak = tile_peak > s.peak[row] ? tile_peak : s.peak[row];
  const std::int32_t keep = s.peak[row] - peak;
  s.join[slot] = tile_peak - peak;
  s.total[row] = scale2(s.total[row], keep) + scale2(sum, s.join[slot]);
  for (size_t i = 0; i < d; ++i) out[i] = scale2(out[i], keep);
  s.peak[row] = peak;
}

void attend_tile(const Table& exp2_table, const Table& recip_table, const AttentionState& s,
                 const AttentionShape& shape, size_t first, const std::uint8_t* mask, float* out) {
  const size_t d = shape.d;
  const size_t count = shape.keys - first < shape.tile ? shape.keys - first : shape.tile;
  const size_t depth = padded(count);
  for (size_t i = 0; i < d; ++i)
    for (size_t j = 0; j < depth; ++j) s.v_tile[i * depth + j] = j < count ? s.v[(first + j) * d + i] : 0;
  for (size_t row = 0; row < shape.rows; row += kRowBlock) {
    const size_t block = shape.rows - row < kRowBlock ? shape.rows - row : kRowBlock;
    multiply(s.q + row * padded(d), block, s.k + first * padded(d), count, padded(d), s.scores, shape.tile);
    for (size_t slot = 0; slot < block; ++slot)
      softmax_row(exp2_table, recip_table, s, row + slot, slot, first, count,
                  mask == nullptr ? nullptr : mask + (row + slot) * shape.keys + first, d, shape.tile,
                  out + (row + slot) * d);
    multiply(s.p, block, s.v_tile, d, depth, s.product, d);
    for (size_t slot = 0; slot < block; ++slot) {
      const float scale = scale2(s.sp[slot], s.join[slot]);
      float* y = out + (row + slot) * d;
      for (size_t i = 0; i < d; ++i) y[i] = y[i] + static_cast<float>(s.product[slot * d + i]) * scale;
    }
  }
}

}  // namespace

extern "C" {

// y[i] = f(x[i]).
void lockstep_apply(const Table* table, size_t n, const float* x, float* y) {
  const FlushToZero mode;
  apply(*table, n, x, y);
}

// y = a + b.
void lockstep_add(size_t n, const float* __restrict a, const float* __restrict b, float* __restrict y) {
  const FlushToZero mode;
  for (size_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}

// q[rows][n] (int8 bit patterns) and s[rows] of x * prescale.
void lockstep_quantise_rows(const Table* recip_table, size_t rows, size_t n, const float* x, const float* prescale,
                            std::uint8_t* q, float* s) {
  const FlushToZero mode;
  for (size_t r = 0; r < rows; ++r) s[r] = quantise_row(*recip_table, n, x + r * n, prescale, q + r * n);
}

// offset[r] = 128 * the sum of row r of w[rows][depth].
void lockstep_offsets(size_t rows, size_t depth, const std::int8_t* w, std::int32_t* offset) {
  for (size_t r = 0; r < rows; ++r) offset[r] = offset_of(w + r * depth, depth);
}

// y[rows][columns] = (float(q * w^T) * s) * sw + bias. q: [rows][k]; w: [columns][padded(k)], zeros beyond k;
// shifted: room for [rows][padded(k)] bytes.
void lockstep_linear(size_t rows, size_t columns, size_t k, const std::int8_t* q, const float* s,
                     const std::int8_t* w, const std::int32_t* offset, const float* sw, const float* bias,
                     std::uint8_t* shifted, float* y) {
  const FlushToZero mode;
  const size_t depth = padded(k);
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < depth; ++i)
      shifted[r * depth + i] = i < k ? static_cast<std::uint8_t>(q[r * k + i]) ^ kFlip : 0;
  std::int32_t sums[4 * kColumnBlock];
  for (size_t column = 0; column < columns; column += kColumnBlock) {
    const size_t width = columns - column < kColumnBlock ? columns - column : kColumnBlock;
    for (size_t row = 0; row < rows; row += 4) {
      const size_t height = rows - row < 4 ? rows - row : 4;
      multiply(shifted + row * depth, height, w + column * depth, width, depth, sums, kColumnBlock);
      for (size_t r = 0; r < height; ++r) {
        float* __restrict out = y + (row + r) * columns + column;
        const float scale = s[row + r];
        for (size_t c = 0; c < width; ++c)
          out[c] = (static_cast<float>(sums[r * kColumnBlock + c] - offset[column + c]) * scale) * sw[column + c];
        if (bias != nullptr)
          for (size_t c = 0; c < width; ++c) out[c] = out[c] + bias[column + c];
      }
    }
  }
}

// y[rows][n] = layer normalisation of x[rows][n]; share = fl(1/n).
void lockstep_layer_norm(const Table* rsqrt_table, size_t rows, size_t n, const float* x, const float* gamma,
                         const float* beta, float share, float eps, float* y) {
  const FlushToZero mode;
  for (size_t r = 0; r < rows; ++r) layer_norm(*rsqrt_table, n, x + r * n, gamma, beta, share, eps, y + r * n);
}

// Bytes of workspace that lockstep_attention needs.
size_t lockstep_attention_workspace(size_t rows, size_t keys, size_t d, size_t tile) {
  Workspace space(nullptr);
  const AttentionState state(space, rows, keys, d, tile);
  static_cast<void>(state);
  return space.used();
}

// out[rows][d], zeroed by the caller like the workspace. mask: [rows][keys] bytes, or null. tile <= keys.
void lockstep_attention(const Table* exp2_table, const Table* recip_table, size_t rows, size_t keys, size_t d,
                        size_t tile, float factor, const float* q, const float* k, const float* v,
                        const std::uint8_t* mask, std::uint8_t* workspace, float* out) {
  const FlushToZero mode;
  Workspace space(workspace);
  const AttentionState s(space, rows, keys, d, tile);
  const size_t depth = padded(d);
  for (size_t r = 0; r < rows; ++r) {
    std::uint8_t* row = s.q + r * depth;
    s.c[r] = quantise_row(*recip_table, d, q + r * d, nullptr, row) * factor;
    for (size_t i = 0; i < d; ++i) row[i] ^= kFlip;
    s.peak[r] = kMaskedExponent;
  }
  for (size_t j = 0; j < keys; ++j) {
    std::int8_t* row = s.k + j * depth;
    s.sk[j] = quantise_row(*recip_table, d, k + j * d, nullptr, reinterpret_cast<std::uint8_t*>(row));
    s.k_offset[j] = offset_of(row, d);
    s.sv[j] = quantise_row(*recip_table, d, v + j * d, nullptr, reinterpret_cast<std::uint8_t*>(s.v + j * d));
  }
  const AttentionShape shape{rows, keys, d, tile};
  for (size_t first = 0; first < keys; first += tile)
    attend_tile(*exp2_table, *recip_table, s, shape, first, mask, out);
  for (size_t r = 0; r < rows; ++r) {
    const float inverse = recip(*recip_table, s.total[r]);
    for (size_t i = 0; i < d; ++i) out[r * d + i] = out[r * d + i] * inverse;
  }
}
}
