// The contract operations on row-major arrays, for a host with ctypes. Buffers are the caller's, checked by kernels.py.
//
// Weights are packed as w + 128, because the fast 8-bit instructions take unsigned times signed; 128 times the sum of
// each row of activations is taken off again, exactly, in arithmetic modulo 2^32.
#include "lockstep/attention.hpp"
#include "lockstep/flush_to_zero.hpp"
#include "lockstep/kernels.hpp"
#include "lockstep/matrix.hpp"
#include "lockstep/threads.hpp"
#include "lockstep/vector_ops.hpp"

using namespace lockstep;
using std::size_t;

namespace {

constexpr std::uint8_t kFlip = 0x80;
constexpr size_t kSmallProduct = 1 << 18;  // products that are too few to call another core for
constexpr size_t kSmallLoop = 1 << 14;     // elements, likewise
constexpr size_t kPieceRows = 8 * kRowBlock;  // rows of a piece of a product: small, so that cores end together
constexpr size_t kElements = 1 << 12;      // of a piece of work, at least

// Never destroyed: after a fork, its threads could not be joined.
std::unique_ptr<Pool>& pool() {
  static auto* const shared = new std::unique_ptr<Pool>(new Pool(std::max(1u, std::thread::hardware_concurrency())));
  return *shared;
}

// work(first, last) on pieces of `rows` rows of n elements.
template <class Work>
void for_rows(size_t rows, size_t n, const Work& work) {
  const size_t step = rows * n < kSmallLoop ? rows : std::max<size_t>(1, kElements / std::max<size_t>(1, n));
  if (rows == 0) return;
  pool()->run((rows + step - 1) / step, [&](size_t i) { work(i * step, std::min(rows, (i + 1) * step)); });
}

// y = f(a, b) element by element; a or b may have one row for all, its stride being 0.
template <class Function>
void for_pairs(size_t rows, size_t n, const float* a, size_t a_stride, const float* b, size_t b_stride, float* y,
               Function function) {
  for_rows(rows, n, [=](size_t first, size_t last) {
    for (size_t r = first; r < last; ++r) {
      const float* __restrict left = a + r * a_stride;
      const float* __restrict right = b + r * b_stride;
      float* __restrict out = y + r * n;
      for (size_t i = 0; i < n; ++i) out[i] = function(left[i], right[i]);
    }
  });
}

// x * prescale (or x) of one row, quantised to int8 bit patterns; returns the scale.
float quantise_row(const Table& recip_table, size_t n, const float* x, const float* prescale, std::uint8_t* out) {
  constexpr float step = 1.0f / 127.0f;
  if (prescale == nullptr) return requantise(recip_table, n, step, [x](size_t i) { return x[i]; }, out);
  return requantise(recip_table, n, step, [x, prescale](size_t i) { return x[i] * prescale[i]; }, out);
}

// A product, in pieces of some rows and one panel of columns.
struct LinearCall {
  size_t rows, columns, depth, stride;
  const std::int8_t* q;
  const std::int32_t* offset;
  const float *s, *sw, *bias;
  const std::uint8_t* packed;
  float* y;

  // y[begin .. end) of the panel that begins at `column`.
  void piece(size_t begin, size_t end, size_t column) const {
    const size_t width = panel_width(columns, column), there = std::min(width, columns - column);
    const std::uint8_t* panel = packed + column * depth;
    std::int32_t sums[kRowBlock * kPanelColumns];
    for (size_t row = begin; row < end; row += kRowBlock) {
      const size_t height = std::min(kRowBlock, end - row);
      multiply_panel(panel, width, depth / kGroup, q + row * stride, height, stride, sums, kPanelColumns);
      for (size_t r = 0; r < height; ++r) finish(row + r, column, there, sums + r * kPanelColumns);
    }
  }

  void finish(size_t row, size_t column, size_t count, const std::int32_t* sum) const {
    if (count == kPanelColumns) return finish_row(row, column, kPanelColumns, sum);
    finish_row(row, column, count, sum);
  }

  // Inlined twice, once for the constant count of a whole panel.
  [[gnu::always_inline]] void finish_row(size_t row, size_t column, size_t count,
                                         const std::int32_t* __restrict sum) const {
    float* __restrict out = y + row * columns + column;
    const float* __restrict channel = sw + column;
    const float scale = s[row];
    const std::int32_t shift = offset[row];
    if (bias == nullptr) {
      for (size_t c = 0; c < count; ++c) out[c] = (static_cast<float>(sum[c] - shift) * scale) * channel[c];
    } else {
      const float* __restrict added = bias + column;
      for (size_t c = 0; c < count; ++c) out[c] = (static_cast<float>(sum[c] - shift) * scale) * channel[c] + added[c];
    }
  }
};

}  // namespace

extern "C" {

// The number of threads from now on. No other call may run meanwhile.
void lockstep_set_threads(size_t threads) { pool().reset(new Pool(threads)); }

size_t lockstep_threads() { return pool()->threads(); }

// y[i] = f(x[i]).
void lockstep_apply(const Table* table, size_t n, const float* x, float* y) {
  for_rows(n, 1, [=](size_t first, size_t last) { apply(*table, last - first, x + first, y + first); });
}

// y[i] = max(x[i], +0).
void lockstep_relu(size_t n, const float* x, float* y) {
  for_rows(n, 1, [=](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) y[i] = relu(x[i]) + 0.0f;
  });
}

// y[rows][n] = a + b, or a * b. A stride is n, or 0 for an operand with one row.
void lockstep_add(size_t rows, size_t n, const float* a, size_t a_stride, const float* b, size_t b_stride, float* y) {
  for_pairs(rows, n, a, a_stride, b, b_stride, y, [](float left, float right) { return left + right; });
}
void lockstep_multiply(size_t rows, size_t n, const float* a, size_t a_stride, const float* b, size_t b_stride,
                       float* y) {
  for_pairs(rows, n, a, a_stride, b, b_stride, y, [](float left, float right) { return left * right; });
}

// q[rows][n] (int8 bit patterns) and s[rows] of x * prescale.
void lockstep_quantise_rows(const Table* recip_table, size_t rows, size_t n, const float* x, const float* prescale,
                            std::uint8_t* q, float* s) {
  for_rows(rows, n, [=](size_t first, size_t last) {
    for (size_t r = first; r < last; ++r) s[r] = quantise_row(*recip_table, n, x + r * n, prescale, q + r * n);
  });
}

// Bytes of w[columns][k] when it is packed.
size_t lockstep_packed_bytes(size_t columns, size_t k) { return packed_bytes(columns, k); }

void lockstep_pack(size_t columns, size_t k, const std::int8_t* w, std::uint8_t* packed) {
  pack_rows(w, columns, k, k, kFlip, packed);
}

// y[rows][columns] = (float(q * w^T) * s) * sw + bias. q: [rows][k]; packed: w.
void lockstep_linear(size_t rows, size_t columns, size_t k, const std::int8_t* q, const float* s,
                     const std::uint8_t* packed, const float* sw, const float* bias, float* y) {
  const size_t depth = round_up(k, kGroup);
  std::vector<std::int32_t> offset(rows);
  for (size_t r = 0; r < rows; ++r) {
    std::int32_t sum = 0;
    for (size_t i = 0; i < k; ++i) sum += q[r * k + i];
    offset[r] = 128 * sum;
  }
  std::vector<std::int8_t> whole;  // rows of whole groups, where k is none
  if (depth != k) {
    whole.resize(rows * depth);
    for (size_t r = 0; r < rows; ++r) std::memcpy(whole.data() + r * depth, q + r * k, k);
  }
  const LinearCall call{rows, columns, depth, depth, depth == k ? q : whole.data(), offset.data(),
                        s,    sw,      bias,  packed, y};
  const size_t panels = (columns + kPanelColumns - 1) / kPanelColumns;
  const size_t height = rows * columns * k < kSmallProduct ? rows : kPieceRows;
  const size_t pieces = (rows + height - 1) / std::max<size_t>(1, height);
  const auto work = [&](size_t i) {
    const size_t begin = i % pieces * height;
    call.piece(begin, std::min(rows, begin + height), i / pieces * kPanelColumns);
  };
  if (rows * columns * k < kSmallProduct) {
    const FlushToZero mode;
    for (size_t panel = 0; panel < panels * pieces; ++panel) work(panel);
  } else {
    pool()->run(panels * pieces, work);
  }
}

// y[rows][n] = layer normalisation of x[rows][n]; share = fl(1/n).
void lockstep_layer_norm(const Table* rsqrt_table, size_t rows, size_t n, const float* x, const float* gamma,
                         const float* beta, float share, float eps, float* y) {
  for_rows(rows, n, [=](size_t first, size_t last) {
    for (size_t r = first; r < last; ++r) layer_norm(*rsqrt_table, n, x + r * n, gamma, beta, share, eps, y + r * n);
  });
}

// y[rows][n] = RMS normalisation of x[rows][n]; share = fl(1/n).
void lockstep_rms_norm(const Table* rsqrt_table, size_t rows, size_t n, const float* x, const float* gamma, float share,
                       float eps, float* y) {
  for_rows(rows, n, [=](size_t first, size_t last) {
    for (size_t r = first; r < last; ++r) rms_norm(*rsqrt_table, n, x + r * n, gamma, share, eps, y + r * n);
  });
}

// y[rows][heads * d] = x with the first 2 * pairs features of every head rotated; cosine, sine: [rows][pairs].
void lockstep_rotary(size_t rows, size_t heads, size_t d, size_t pairs, int interleaved, const float* x,
                     const float* cosine, const float* sine, float* y) {
  const auto turn = interleaved != 0 ? &rotary<true> : &rotary<false>;
  for_rows(rows, heads * d, [=](size_t first, size_t last) {
    for (size_t r = first; r < last; ++r)
      for (size_t h = 0; h < heads; ++h) {
        const size_t at = (r * heads + h) * d;
        turn(d, pairs, x + at, cosine + r * pairs, sine + r * pairs, y + at);
      }
  });
}

// Quantises x[rows][heads * d] by head, into a cache of this layout; q and s point to the first key that is written.
void lockstep_keep(const Table* recip_table, size_t rows, size_t heads, size_t d, const float* x,
                   const CacheLayout* layout, std::uint8_t* q, float* s) {
  for_rows(rows, heads * d, [=](size_t first, size_t last) {
    for (size_t r = first; r < last; ++r)
      for (size_t h = 0; h < heads; ++h)
        s[r * layout->scale_row + h * layout->scale_head] =
            quantise_row(*recip_table, d, x + (r * heads + h) * d, nullptr, q + r * layout->row + h * layout->head);
  });
}

// out = attention of q to the cache; see AttentionCall. window: 0 for none; bias, mask: may be null.
void lockstep_attention(const Table* exp2_table, const Table* recip_table, size_t rows, size_t keys, size_t heads,
                        size_t kv_heads, size_t d, size_t tile, float factor, int causal, std::int64_t window,
                        const std::int64_t* positions, const float* q, const std::int8_t* k, const float* sk,
                        const std::int8_t* v, const float* sv, const CacheLayout* layout, const float* bias,
                        const std::uint8_t* mask, float* out) {
  const AttentionCall call{exp2_table,  recip_table, rows, keys, heads, kv_heads, d,    tile, factor, causal != 0, window,
                           positions,   q,           k,    v,    sk,    sv,       *layout, bias, mask,   out};
  const size_t blocks = call.blocks();
  const auto work = [&](size_t i) {
    thread_local QueryBlock block;
    block.run(call, i / blocks, i % blocks);
  };
  if (rows * keys * heads * d < kSmallProduct) {
    const FlushToZero mode;
    for (size_t i = 0; i < kv_heads * blocks; ++i) work(i);
  } else {
    pool()->run(kv_heads * blocks, work);
  }
}
}
