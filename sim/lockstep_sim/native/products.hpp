// The tiles of a MATRIX instruction, by the dot-product instructions of the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "instructions.hpp"  // generated
#include "lockstep/dot.hpp"
#include "packed_weights.hpp"

namespace lockstep {

// A result tile by columns, as VECTOR takes it: sum[c][r] is that of row r and column c.
struct Tile {
    Tile() {}  // sums are written before they are read
    alignas(64) int32_t sum[isa::kRows][isa::kRows];
};

// Result tiles between MATRIX and VECTOR: a ring that grows.
class TileQueue {
  public:
    size_t size() const { return appended_ - taken_; }
    void clear() { appended_ = taken_ = 0; }
    Tile& append() {
        if (size() == ring_.size()) grow();
        return ring_[appended_++ % ring_.size()];
    }
    // Valid until another tile is appended.
    const Tile& take() { return ring_[taken_++ % ring_.size()]; }

  private:
    void grow() {
        const size_t count = ring_.size();
        std::rotate(ring_.begin(), ring_.begin() + ptrdiff_t(taken_ % count), ring_.end());
        ring_.resize(2 * count);
        taken_ = 0, appended_ = count;
    }

    std::vector<Tile> ring_ = std::vector<Tile>(2 * isa::kAccumulatorTiles);
    size_t appended_ = 0, taken_ = 0;
};

// One operand of a tile as dot products take it, four inputs of a channel side by side: byte i of channel c of step g
// stands at (g R + c) 4 + i. Inputs behind the last are zeros, and so are kZeroSteps - 1 steps behind the last.
class Panel {
  public:
    static constexpr size_t kChannels = isa::kRows, kStep = kGroup * kChannels, kZeroSteps = 4;

    const uint8_t* data() const { return bytes_.data(); }
    const int8_t* signed_data() const { return reinterpret_cast<const int8_t*>(bytes_.data()); }

    // `words`: [depth][R]. Every byte is combined with `flip`.
    void pack(const uint8_t* __restrict words, size_t depth, uint8_t flip) {
        const size_t whole = depth / kGroup, rest = depth % kGroup;
        // The vector at the last step may reach behind it.
        bytes_.resize((whole + kZeroSteps) * kStep + kGroup * kVectorColumns);
        uint8_t* __restrict to = bytes_.data();
        for (size_t g = 0; g < whole; g++, words += kStep, to += kStep)
            for (size_t c = 0; c < kChannels; c++)
                for (size_t i = 0; i < kGroup; i++) to[kGroup * c + i] = words[kChannels * i + c] ^ flip;
        std::memset(to, 0, kZeroSteps * kStep);
        for (size_t c = 0; c < kChannels; c++)
            for (size_t i = 0; i < rest; i++) to[kGroup * c + i] = words[kChannels * i + c] ^ flip;
    }

  private:
    std::vector<uint8_t> bytes_;
};

// The products of one instruction at a time. Operands are packed when they are first needed, and kept until they make
// room or the next instruction begins.
//
// Dot products take unsigned times signed bytes. Signed left operands become x + 128, and 128 times the sum of each
// weight channel is taken off again, exactly, in arithmetic modulo 2^32.
class Products {
  public:
    // `activation` and `weight`: the scratchpads, which nobody changes until the next instruction begins.
    void begin(const isa::Matrix& i, const int8_t* activation, const int8_t* weight) {
        activation_ = reinterpret_cast<const uint8_t*>(activation), weight_ = reinterpret_cast<const uint8_t*>(weight);
        depth_ = i.depth, flip_ = i.unsigned_ ? 0 : kFlip;
        format_ = WeightFormat(i);
        left_.word = kNone;
        for (Top& top : tops_) top.word = kNone;
    }

    // The tile of the operands that begin at words `a` and `w`; tiles of the same `number` mostly have the same `w`.
    void tile(uint32_t a, uint32_t w, uint32_t number, Tile& tile) {
        Top& top = tops_[number % kTops];
        if (top.word != w) pack(top, w);
        if (top.wide) return multiply_wide(a, w, tile);
        if (left_.word != a) left_.panel.pack(activation_ + a * Panel::kChannels, depth_, flip_), left_.word = a;
        multiply(left_.panel.data(), top.panel.signed_data(), steps(), top.first, tile);
    }

  private:
    static constexpr uint32_t kNone = UINT32_MAX;
    static constexpr uint8_t kFlip = 0x80;
    static constexpr size_t kTops = 32, kChannels = Panel::kChannels;

    struct Left {
        uint32_t word = kNone;
        Panel panel;
    };
    struct Top {
        uint32_t word = kNone;
        bool wide = false;  // a value does not fit a byte
        Panel panel;
        int32_t first[kChannels];  // what the sums of each channel start from
    };

    void pack(Top& top, uint32_t w) {
        const uint8_t* words = weight_ + w * kChannels;
        top.word = w, top.wide = false;
        if (format_.packed()) {
            expand(words);
            narrow_.resize(expanded_.size());
            for (size_t n = 0; n < depth_ * kChannels; n++) narrow_[n] = uint8_t(expanded_[n]);
            for (size_t n = 0; n < depth_ * kChannels; n++) top.wide |= expanded_[n] != int8_t(expanded_[n]);
            words = narrow_.data();
        }
        top.panel.pack(words, depth_, 0);
        std::memset(top.first, 0, sizeof top.first);
        if (flip_) take_off(top);
    }

    // The flip times the sum of each channel.
    void take_off(Top& top) const {
        using D = Dot<int8_t>;
        const uint8_t ones[kGroup] = {1, 1, 1, 1};
        for (size_t column = 0; column < kChannels; column += kVectorColumns) {
            const int8_t* from = top.panel.signed_data() + column * kGroup;
            Sums sums[4] = {D::zero(), D::zero(), D::zero(), D::zero()};  // one would wait for itself
            for (size_t g = 0; g < (steps() + 3) / 4; g++)
                for (Sums& sum : sums) sum = D::add(sum, D::load(from), D::broadcast(ones)), from += Panel::kStep;
            for (const Sums& sum : sums) {
                int32_t all[kVectorColumns];
                D::store(all, sum);
                for (size_t c = 0; c < std::min(kVectorColumns, kChannels); c++) top.first[column + c] -= kFlip * all[c];
            }
        }
    }

    size_t steps() const { return (depth_ + kGroup - 1) / kGroup; }

    void expand(const uint8_t* words) {
        expanded_.resize((depth_ + 3) * kChannels);
        format_.expand<isa::kRows>(words, uint32_t(depth_), expanded_.data());
    }

    static void multiply(const uint8_t* left, const int8_t* top, size_t steps, const int32_t* first, Tile& tile) {
        using D = Dot<uint8_t>;
        constexpr size_t kColumns = std::min(kChannels, kSumsInRegisters);
        for (size_t row = 0; row < kChannels; row += kVectorColumns)
            for (size_t column = 0; column < kChannels; column += kColumns) {
                Sums sums[kColumns];
                for (size_t c = 0; c < kColumns; c++) sums[c] = D::all(first[column + c]);
                for (size_t g = 0; g < steps; g++) {
                    const D::Left rows = D::load(left + g * Panel::kStep + row * kGroup);
                    const int8_t* four = top + g * Panel::kStep + column * kGroup;
#pragma GCC unroll 16
                    for (size_t c = 0; c < kColumns; c++) sums[c] = D::add(sums[c], rows, D::broadcast(four + c * kGroup));
                }
                for (size_t c = 0; c < kColumns; c++) {
                    int32_t all[kVectorColumns];
                    D::store(all, sums[c]);
                    std::memcpy(&tile.sum[column + c][row], all, std::min(sizeof all, sizeof tile.sum[0]));
                }
            }
    }

    // Sparse values whose positions coincide add up, perhaps to more than a byte. No compiler makes them.
    void multiply_wide(uint32_t a, uint32_t w, Tile& tile) {
        expand(weight_ + w * kChannels);
        const uint8_t* left = activation_ + a * kChannels;
        for (size_t c = 0; c < kChannels; c++)
            for (size_t r = 0; r < kChannels; r++) {
                int32_t sum = 0;
                for (size_t k = 0; k < depth_; k++) {
                    const uint8_t x = left[k * kChannels + r];
                    sum += (flip_ ? int8_t(x) : x) * expanded_[k * kChannels + c];
                }
                tile.sum[c][r] = sum;
            }
    }

    const uint8_t *activation_ = nullptr, *weight_ = nullptr;
    size_t depth_ = 0;
    uint8_t flip_ = 0;
    WeightFormat format_;
    Left left_;
    Top tops_[kTops];
    std::vector<int16_t> expanded_;  // packed weights of a tile, and the same as bytes
    std::vector<uint8_t> narrow_;
};

}  // namespace lockstep
