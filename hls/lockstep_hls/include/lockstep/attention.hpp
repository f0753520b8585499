// Attention over a cache of quantised keys and values, streaming over tiles of keys (docs/numerics.md).
//
// Queries that read the same head of the cache go together, so that a tile is packed once for all of them.
#pragma once

#include <limits>
#include <vector>

#include "lockstep/matrix.hpp"
#include "lockstep/vector_ops.hpp"

namespace lockstep {

constexpr std::size_t kQueryBlock = 8 * kRowBlock;
constexpr float kLog2E = 1.44269504088896340736f;

// Where the keys and values of a cache lie: of key j and head h the d numbers begin at j * row + h * head, and the scale
// stands at j * scale_row + h * scale_head.
struct CacheLayout {
  std::size_t row, head, scale_row, scale_head;
};

// What one call computes: out[rows][heads * d] from q, likewise, and a cache of `keys` keys and values.
struct AttentionCall {
  const Table *exp2, *recip;
  std::size_t rows, keys, heads, kv_heads, d, tile;
  float factor;                   // log2(e) * scale
  bool causal;
  std::int64_t window;            // 0: none
  const std::int64_t* positions;  // [rows]
  const float* q;
  const std::int8_t *k, *v;
  const float *sk, *sv;
  CacheLayout layout;
  const float* bias;         // [heads][rows][keys] or null
  const std::uint8_t* mask;  // [rows][keys] or null
  float* out;

  std::size_t group() const { return heads / kv_heads; }
  std::size_t blocks() const { return (rows * group() + kQueryBlock - 1) / kQueryBlock; }
};

// work(j) for every j < count and as many more as complete 64: without a rest, short loops are worth vectorising.
template <class Work>
inline void for_panels(std::size_t count, const Work& work) {
  for (std::size_t begin = 0; begin < count; begin += kPanelColumns) {
#pragma GCC ivdep
    for (std::size_t j = 0; j < kPanelColumns; ++j) work(begin + j);
  }
}

// Keys begin .. end - 1.
struct Range {
  std::size_t begin, end;
  bool empty() const { return begin >= end; }
  Range within(std::size_t first, std::size_t last) const { return {std::max(begin, first), std::min(end, last)}; }
  Range with(Range other) const {
    return empty() ? other : other.empty() ? *this : Range{std::min(begin, other.begin), std::max(end, other.end)};
  }
};

// A block of queries of one head of the cache, and the buffers of its tiles. A thread keeps one for all its blocks.
class QueryBlock {
 public:
  void run(const AttentionCall& call, std::size_t kv_head, std::size_t block) {
    call_ = &call;
    kv_head_ = kv_head;
    first_ = block * kQueryBlock;
    count_ = std::min(kQueryBlock, call.rows * call.group() - first_);
    depth_ = round_up(call.d, kGroup);
    begin();
    Range all{0, 0};
    for (std::size_t i = 0; i < count_; ++i) all = all.with(seen_[i]);
    for (std::size_t first = all.begin / call.tile * call.tile; first < all.end; first += call.tile)
      attend_tile(first, std::min(call.tile, call.keys - first), all);
    for (std::size_t i = 0; i < count_; ++i) {
      const float inverse = recip(*call.recip, total_[i]);
      float* __restrict y = call.out + row(i) * call.heads * call.d + head(i) * call.d;
      const float* __restrict o = out_.data() + i * call.d;
      for (std::size_t f = 0; f < call.d; ++f) y[f] = o[f] * inverse;
    }
  }

 private:
  std::size_t row(std::size_t i) const { return (first_ + i) / call_->group(); }
  std::size_t head(std::size_t i) const { return kv_head_ * call_->group() + (first_ + i) % call_->group(); }

  // Quantises the queries and notes which keys they see.
  void begin() {
    const AttentionCall& call = *call_;
    q_.assign(kQueryBlock * depth_, 0);
    out_.assign(kQueryBlock * call.d, 0.0f);
    for (std::size_t i = 0; i < count_; ++i) {
      const float* x = call.q + row(i) * call.heads * call.d + head(i) * call.d;
      std::uint8_t* q = q_.data() + i * depth_;
      factor_[i] = requantise(*call.recip, call.d, 1.0f / 127.0f, [x](std::size_t f) { return x[f]; }, q) * call.factor;
      std::int32_t sum = 0;
      for (std::size_t f = 0; f < call.d; ++f) sum += static_cast<std::int8_t>(q[f]);
      offset_[i] = 128 * sum;
      peak_[i] = kMaskedExponent;
      total_[i] = 0.0f;
      const auto keys = static_cast<std::int64_t>(call.keys);
      const std::int64_t position = call.positions[row(i)];
      const std::int64_t end = call.causal ? std::min(keys, position + 1) : keys;
      const std::int64_t start = call.window > 0 ? position - call.window + 1 : 0;
      seen_[i] = {static_cast<std::size_t>(std::max<std::int64_t>(0, start)),
                  static_cast<std::size_t>(std::max<std::int64_t>(0, end))};
    }
  }

  // Scales of the tile side by side. A bad value scale spoils masked keys too: then no key may be left out.
  bool gather_scales(std::size_t first, std::size_t count) {
    const AttentionCall& call = *call_;
    for (auto* scales : {&sk_, &sv_}) scales->assign(round_up(count, kPanelColumns), 0.0f);
    bool finite = true;
    for (std::size_t j = 0; j < count; ++j) {
      const std::size_t at = (first + j) * call.layout.scale_row + kv_head_ * call.layout.scale_head;
      sk_[j] = call.sk[at];
      sv_[j] = call.sv[at];
      finite &= magnitude_bits(sv_[j]) < kInfinity;
    }
    return finite;
  }

  // The keys of a tile that are looked at, from a multiple of 64 on: what lies before and behind only adds zeros.
  static Range looked_at(Range seen, std::size_t first, std::size_t count, bool finite) {
    const Range inside = seen.within(first, first + count);
    if (inside.empty()) return {0, 0};
    if (!finite) return {0, count};
    return {(inside.begin - first) / kPanelColumns * kPanelColumns, inside.end - first};
  }

  void attend_tile(std::size_t first, std::size_t count, Range all) {
    const AttentionCall& call = *call_;
    const bool finite = gather_scales(first, count);
    const Range packed = looked_at(all, first, count, finite);
    const std::size_t size = packed.end - packed.begin, stride = call.layout.row;
    const std::size_t at = (first + packed.begin) * stride + kv_head_ * call.layout.head;
    k_.resize(packed_bytes(size, depth_));
    v_.resize(packed_bytes(call.d, size));
    pack_rows(call.k + at, size, call.d, stride, 0x80, k_.data());
    pack_columns(call.v + at, call.d, size, stride, v_.data());
    const std::size_t room = round_up(size, kPanelColumns);
    for (auto* buffer : {&m_, &e_}) buffer->resize(room);
    n_.resize(room);
    scores_.resize(kRowBlock * room);
    p_.resize(kRowBlock * room);
    for (std::size_t i = 0; i < count_; i += kRowBlock) {
      const std::size_t rows = std::min(kRowBlock, count_ - i);
      Range seen{0, 0};
      for (std::size_t r = 0; r < rows; ++r) seen = seen.with(seen_[i + r].within(first, first + count));
      const Range keys = looked_at(seen, first, count, finite);
      if (!keys.empty()) attend_rows(i, rows, first, packed, keys);
    }
  }

  // Queries i .. i + rows - 1 on the keys of a tile that were packed from packed.begin on.
  void attend_rows(std::size_t i, std::size_t rows, std::size_t first, Range packed, Range keys) {
    const AttentionCall& call = *call_;
    const std::size_t total = packed.end - packed.begin, room = round_up(total, kPanelColumns);
    const std::size_t size = keys.end - keys.begin, skipped = keys.begin - packed.begin;
    const auto* q = reinterpret_cast<const std::int8_t*>(q_.data()) + i * depth_;
    for (std::size_t j = 0; j < size; j += kPanelColumns)
      multiply_panel(k_.data() + (skipped + j) * depth_, panel_width(total, skipped + j), depth_ / kGroup, q, rows,
                     depth_, scores_.data() + j, room);
    const std::size_t groups = round_up(size, kGroup) / kGroup;
    for (std::size_t r = 0; r < rows; ++r) softmax_row(i + r, r, room, first, keys);
    const std::size_t all_groups = round_up(total, kGroup) / kGroup;
    for (std::size_t f = 0; f < call.d; f += kPanelColumns) {
      const std::size_t width = panel_width(call.d, f), features = std::min(width, call.d - f);
      std::int32_t sums[kRowBlock * kPanelColumns];
      const std::int8_t* v = v_.data() + f * all_groups * kGroup + skipped * width;
      multiply_panel(v, width, groups, p_.data(), rows, room, sums, kPanelColumns);
      for (std::size_t r = 0; r < rows; ++r) {
        if (!sees_[r]) continue;
        float* __restrict o = out_.data() + (i + r) * call.d + f;
        const float keep = keep_[r], sp = sp_[r];
        for (std::size_t c = 0; c < features; ++c)
          o[c] = o[c] * keep + static_cast<float>(sums[r * kPanelColumns + c]) * sp;
      }
    }
  }

  // Scores of query i over the keys become probabilities in row `slot` of p_; peak and total move on.
  void softmax_row(std::size_t i, std::size_t slot, std::size_t room, std::size_t first, Range keys) {
    const AttentionCall& call = *call_;
    const std::size_t size = keys.end - keys.begin, from = first + keys.begin;
    std::uint8_t* p = p_.data() + slot * room;
    const Range seen = seen_[i].within(from, first + keys.end);
    const std::uint8_t* mask = call.mask == nullptr ? nullptr : call.mask + row(i) * call.keys + from;
    sees_[slot] = !seen.empty() && (mask == nullptr || std::any_of(mask, mask + size, [](auto x) { return x != 0; }));
    if (!sees_[slot]) {
      std::fill_n(p, round_up(size, kGroup), std::uint8_t{0});
      return;
    }
    const std::size_t low = seen.begin - from, high = seen.end - from;
    const std::size_t padded = round_up(size, kPanelColumns);  // what is behind the last key is a zero, and adds nothing
    float* __restrict m = m_.data();
    float* __restrict e = e_.data();
    std::int32_t* __restrict n = n_.data();
    const float* __restrict sv = sv_.data() + keys.begin;
    const float* bias = call.bias == nullptr ? nullptr : call.bias + (head(i) * call.rows + row(i)) * call.keys + from;
    score_row(*call.exp2, size, scores_.data() + slot * room, offset_[i], sk_.data() + keys.begin, factor_[i], bias, m,
              n);
    if (mask != nullptr)
      for (std::size_t j = 0; j < size; ++j) n[j] = mask[j] ? n[j] : kMaskedExponent;
    std::int32_t peak = peak_[i];
    for (std::size_t j = low; j < high; ++j) peak = n[j] > peak ? n[j] : peak;
    for_panels(padded, [=](std::size_t j) { e[j] = scale_down(m[j], n[j] - peak); });
    std::fill(e, e + low, 0.0f);
    std::fill(e + high, e + padded, 0.0f);
    if (mask != nullptr)
      for (std::size_t j = 0; j < size; ++j) e[j] = mask[j] ? e[j] : 0.0f;
    sp_[slot] = requantise(*call.recip, padded, 1.0f / 255.0f, [e, sv](std::size_t j) { return e[j] * sv[j]; }, p);
    keep_[slot] = scale2(1.0f, peak_[i] - peak);
    total_[i] = total_[i] * keep_[slot] + rowsum(padded, [e](std::size_t j) { return e[j]; });
    peak_[i] = peak;
  }

  // (m[j], n[j]) with 2^z = m * 2^n for z = (float(score[j] - offset) * scale[j]) * factor + bias[j] * log2(e). It stays
  // a function of its own: inlined, g++ forgets that outputs do not overlap the rest, and does not vectorise it.
  [[gnu::noinline]] static void score_row(const Table& exp2_table, std::size_t count,
                                          const std::int32_t* __restrict score, std::int32_t offset,
                                          const float* __restrict scale, float factor, const float* __restrict bias,
                                          float* __restrict m, std::int32_t* __restrict n) {
    const auto place = [&](std::size_t j, float z) {
      const Address at = address(exp2_table, clamp_score(z));
      n[j] = at.integer;
      m[j] = at.d;
    };
    const auto scaled = [&](std::size_t j) { return (static_cast<float>(score[j] - offset) * scale[j]) * factor; };
    if (bias == nullptr) {
      for_panels(count, [&](std::size_t j) { place(j, scaled(j)); });
    } else {
      for (std::size_t j = 0; j < count; ++j) place(j, scaled(j) + bias[j] * kLog2E);
    }
    segments<32>(exp2_table, count, n, m, m);
    for_panels(count, [n](std::size_t j) { n[j] >>= 5; });
  }

  const AttentionCall* call_ = nullptr;
  std::size_t kv_head_ = 0, first_ = 0, count_ = 0, depth_ = 0;
  float factor_[kQueryBlock], total_[kQueryBlock];       // of each query
  std::int32_t offset_[kQueryBlock], peak_[kQueryBlock];
  Range seen_[kQueryBlock];
  float keep_[kRowBlock], sp_[kRowBlock];                // of each row of a product
  bool sees_[kRowBlock];
  std::vector<std::uint8_t> q_, k_, p_;
  std::vector<std::int8_t> v_;
  std::vector<float> out_, sk_, sv_, m_, e_;
  std::vector<std::int32_t> scores_, n_;
};

}  // namespace lockstep
