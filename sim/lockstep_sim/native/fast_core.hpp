// The memories of a core and what each instruction does to them, at native speed. No time: that is timing.hpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arithmetic.hpp"
#include "instructions.hpp"  // generated
#include "lockstep/fused_pass.hpp"
#include "packed_weights.hpp"
#include "products.hpp"
#include "recording.hpp"
#include "row_maxima.hpp"
#include "selection.hpp"
#include "zero_words.hpp"

namespace lockstep {

using isa::Destination;
using isa::ErrorCode;
using isa::FirstAdd;
using isa::FirstMultiply;
using isa::Function;
using isa::kRows;
using isa::Mask;
using isa::Maximum;
using isa::Memory;
using isa::SecondAdd;
using isa::SecondMultiply;
using isa::Source;
using isa::Tap;
using isa::ThirdMultiply;

struct Failure {
    ErrorCode code = ErrorCode::kNone;
    uint32_t address = 0;
    isa::Unit unit = isa::Unit::kLoad;
    bool control = false;
    explicit operator bool() const { return code != ErrorCode::kNone; }
};

class FastCore {
  public:
    static constexpr uint32_t kZeroFlag = 1, kNonfiniteFlag = 2;

    explicit FastCore(uint64_t bytes)
        : memory(bytes),
          activation_(size_t(isa::kActivationWords) * kRows),
          weight_(size_t(isa::kWeightWords) * kRows),
          vector_(size_t(isa::kVectorWords) * kRows + Arithmetic::kVector),
          parameter_(size_t(isa::kParameterWords) * kRows + Arithmetic::kVector),
          tables_(isa::kTableSlots) {}

    std::vector<uint8_t> memory;
    uint64_t window_base = 0, window_limit = 0;
    uint32_t flags = 0;
    IndexMemory index;
    std::vector<Jump> jumps;  // of the last MATRIX instruction
    Recording recording;

    void reset() { tiles_.clear(); }

    Failure load(const isa::Load& i) {
        const uint32_t word = i.memory == Memory::kTable                                          ? isa::kTableEntryBytes
                              : i.memory == Memory::kVector || i.memory == Memory::kParameter ? 4 * kRows
                                                                                              : kRows;
        const uint32_t depth = depth_of(i.memory);
        if (!index.in_bounds(i)) return {ErrorCode::kLocalBounds, isa::kIndexEntries, isa::Unit::kLoad};
        for (uint32_t row = 0; row < i.rows; row++) {
            const uint64_t at = uint32_t(i.address + index.row(i, row) * i.stride), bytes = uint64_t(i.words) * word;
            if (Failure f = transfer(at, bytes, i.stride, isa::Unit::kLoad)) return f;
            const uint32_t local = uint16_t(i.local + row * i.local_stride);
            if (local + i.words > depth) return {ErrorCode::kLocalBounds, depth, isa::Unit::kLoad};
            const uint8_t* from = memory.data() + at;
            switch (i.memory) {
                case Memory::kActivation:
                    std::memcpy(&activation_[size_t(local) * kRows], from, bytes);
                    zero_.written(activation_.data(), local, i.words);
                    break;
                case Memory::kWeight: std::memcpy(&weight_[size_t(local) * kRows], from, bytes); break;
                case Memory::kVector: flush_copy(from, i.words * kRows, &vector_[size_t(local) * kRows]); break;
                case Memory::kParameter: flush_copy(from, i.words * kRows, &parameter_[size_t(local) * kRows]); break;
                case Memory::kTable: load_table(from, local, i.words); break;
            }
        }
        return {};
    }

    Failure store(const isa::Store& i) {
        const uint32_t lane_bytes = i.bytes ? 1 : 4, word = lane_bytes * kRows;
        for (uint32_t row = 0; row < i.rows; row++) {
            const uint64_t at = uint32_t(i.address + row * i.stride), bytes = uint64_t(i.words) * word;
            if (Failure f = transfer(at, bytes, i.stride, isa::Unit::kStore)) return f;
            const uint32_t local = uint16_t(i.local + row * i.local_stride);
            if (local + i.words > isa::kVectorWords) return {ErrorCode::kLocalBounds, isa::kVectorWords, isa::Unit::kStore};
            const uint32_t first = row ? 0 : std::min<uint32_t>(i.lane, kRows);
            const uint32_t end = row || !i.lane_only ? uint32_t(kRows) : std::min<uint32_t>(first + 1, kRows);
            const float* from = &vector_[size_t(local) * kRows];
            uint8_t* to = memory.data() + at;
            if (!i.bytes && end - first == uint32_t(kRows)) {
                std::memcpy(to, from, bytes);
                continue;
            }
            for (uint32_t n = 0; n < i.words; n++, from += kRows, to += word)
                for (uint32_t r = first; r < end; r++) std::memcpy(to + r * lane_bytes, from + r, lane_bytes);
        }
        return {};
    }

    Failure matrix(const isa::Matrix& i) {
        const uint32_t words = WeightFormat(i).words(i.depth);
        products_.begin(i, activation_.data(), weight_.data());
        jumps.clear();
        for (uint32_t outer = 0; outer < i.outer; outer++)
            for (uint32_t inner = 0; inner < i.inner; inner++) {
                const uint32_t a = uint16_t(i.a + outer * i.a_outer + inner * i.a_inner);
                const uint32_t w = uint16_t(i.w + outer * i.w_outer + inner * i.w_inner);
                if (a + i.depth > isa::kActivationWords || w + words > isa::kWeightWords)
                    return {ErrorCode::kLocalBounds, isa::kActivationWords, isa::Unit::kMatrix};
                products_.tile(a, w, inner, tiles_.append());
            }
        zero_.find(i, jumps);
        return {};
    }

    Failure vector(const isa::Vector& i) {
        const uint32_t columns = i.columns, words = (columns + kRows - 1) / kRows;
        x_.resize(size_t(columns) * kRows + Arithmetic::kVector);
        before_.resize(x_.size());
        rounded_.resize(x_.size());
        if (!index.in_bounds(i)) return {ErrorCode::kLocalBounds, isa::kIndexEntries, isa::Unit::kVector};
        for (uint32_t tile = 0; tile < i.tiles; tile++) {
            if (!in_bounds(i, tile, words)) return {ErrorCode::kLocalBounds, 0, isa::Unit::kVector};
            pass(i, tile);
        }
        return {};
    }

    bool has_tiles(uint32_t count) const { return tiles_.size() >= count; }

  private:
    using Pass = FusedPass<kRows>;

    static uint32_t depth_of(Memory memory) {
        switch (memory) {
            case Memory::kActivation: return isa::kActivationWords;
            case Memory::kWeight: return isa::kWeightWords;
            case Memory::kVector: return isa::kVectorWords;
            case Memory::kParameter: return isa::kParameterWords;
            default: return isa::kTableSlots * isa::kTableEntries;
        }
    }

    Failure transfer(uint64_t at, uint64_t bytes, uint32_t stride, isa::Unit unit) const {
        if ((at | stride) % isa::kBusBytes) return {ErrorCode::kMisaligned, uint32_t(at), unit};
        if (at < window_base || at + bytes > window_limit) return {ErrorCode::kOutOfWindow, uint32_t(at), unit};
        return {};
    }

    static void flush_copy(const uint8_t* from, size_t count, float* to) {
        for (size_t n = 0; n < count; n++) {
            uint32_t bits;
            std::memcpy(&bits, from + 4 * n, 4);
            bits = (bits & kInfinity) == 0 ? bits & kSign : bits;
            std::memcpy(to + n, &bits, 4);
        }
    }

    void load_table(const uint8_t* from, uint32_t entry, uint32_t count) {
        for (uint32_t n = 0; n < count; n++, entry++) {
            uint32_t c[3];
            std::memcpy(c, from + size_t(n) * isa::kTableEntryBytes, sizeof c);
            Table& table = tables_[entry / kMaxEntries];
            table.c0[entry % kMaxEntries] = float_of(c[0]);
            table.c1[entry % kMaxEntries] = float_of(c[1] & ~0xFFu);
            table.c2[entry % kMaxEntries] = float_of(c[2] & ~0xFFFFu);
        }
    }

    static bool lane0_used(const isa::Vector& i) {
        return i.add1 == FirstAdd::kLane0 || i.mul2 == SecondMultiply::kLane0 || i.function == Function::kExp2;
    }

    static bool y_used(const isa::Vector& i) {
        return i.add1 == FirstAdd::kY || i.add2 == SecondAdd::kY || i.mul3 == ThirdMultiply::kY;
    }

    bool in_bounds(const isa::Vector& i, uint32_t tile, uint32_t words) const {
        const uint32_t v = isa::kVectorWords, p = isa::kParameterWords;
        auto inside = [](uint32_t start, uint32_t count, uint32_t depth) { return uint16_t(start) + count <= depth; };
        bool ok = true;
        if (i.source != Source::kAccumulator)
            ok &= inside(i.x + tile * i.x_stride, i.columns, i.source == Source::kVector ? v : p);
        if (y_used(i)) ok &= inside(i.y + tile * i.y_stride, i.columns, v);
        if (lane0_used(i)) ok &= inside(i.lane0 + tile, 1, p);
        if (i.mul1 == FirstMultiply::kLane1) ok &= inside(i.lane1 + tile, 1, p);
        if (i.mul1 == FirstMultiply::kColumn0 || i.mul2 == SecondMultiply::kColumn0) ok &= inside(i.column0, words, p);
        if (i.add2 == SecondAdd::kColumn1) ok &= inside(i.column1, words, p);
        if (i.mul3 == ThirdMultiply::kColumn2) ok &= inside(i.column2, words, p);
        if (i.sum) ok &= inside(i.sum_to + tile, 1, p);
        const uint32_t maxima = RowMaxima::count(i);
        if (i.maximum != Maximum::kNone) ok &= inside(i.max_to + tile * maxima, maxima, p);
        const uint32_t to = i.to + tile * i.to_stride;
        switch (i.destination) {
            case Destination::kNone: break;
            case Destination::kVector:
            case Destination::kBytes: ok &= inside(to, i.columns, v); break;
            case Destination::kParameter: ok &= inside(to, i.columns, p); break;
            case Destination::kActivation: ok &= inside(to, i.columns, isa::kActivationWords); break;
            case Destination::kWeight: ok &= inside(to, i.columns, isa::kWeightWords); break;
            case Destination::kWeightTransposed:
                for (uint32_t g = 0; g < words; g++) ok &= inside(to + g * i.to_group, kRows, isa::kWeightWords);
                break;
            case Destination::kBytesTransposed:
                for (uint32_t g = 0; g < words; g++) ok &= inside(to + g * i.to_group, kRows, v);
        }
        return ok;
    }

    const Table& table_for(const isa::Vector& i) {
        Table& table = tables_[i.table];
        struct Shape {
            Kind kind;
            int32_t k, base, entries;
        };
        const int32_t k = int32_t(i.shift);
        const Shape shape = i.function == Function::kExp2        ? Shape{Kind::kExp2, 5, 0, 32}
                            : i.function == Function::kRecip     ? Shape{Kind::kRecip, 6, 64, 65}
                            : i.function == Function::kRsqrt     ? Shape{Kind::kRsqrt, 5, 32, 97}
                            : i.function == Function::kReluMinus ? Shape{Kind::kReluMinus, k, 0, kMaxEntries}
                            : i.function == Function::kOdd       ? Shape{Kind::kOdd, k, 0, kMaxEntries}
                                                                 : Shape{Kind::kSigmoid, k, 0, kMaxEntries};
        table.kind = shape.kind, table.k = shape.k, table.base = shape.base, table.entries = shape.entries;
        return table;
    }

    void note_reciprocals(const float* x, size_t count) {
        for (size_t n = 0; n < count; n++) {
            const uint32_t field = bits_of(x[n]) & kInfinity;
            flags |= field == 0 ? kZeroFlag : field == kInfinity ? kNonfiniteFlag : 0;
        }
    }

    void pass(const isa::Vector& i, uint32_t tile) {
        const size_t columns = i.columns;
        float* x = x_.data();
        const auto parameter = [this](uint32_t word) { return &parameter_[size_t(word) % isa::kParameterWords * kRows]; };
        const float* lane0 = parameter(uint16_t(i.lane0 + tile));
        const float* column2 = parameter(i.column2);
        const float* y = &vector_[size_t(uint16_t(i.y + tile * i.y_stride)) % isa::kVectorWords * kRows];
        const Arithmetic steps{i, lane0, parameter(uint16_t(i.lane1 + tile)), parameter(i.column0), parameter(i.column1), y};
        if (i.source == Source::kAccumulator) {
            for (size_t j = 0; j < columns; j += kRows)
                steps.run(j, std::min<size_t>(columns - j, kRows), &tiles_.take().sum[0][0], x + j * kRows);
        } else {
            const auto& from = i.source == Source::kVector ? vector_ : parameter_;
            const float* words = &from[size_t(uint16_t(i.x + tile * i.x_stride)) * kRows];
            if (i.source == Source::kInteger) Pass::convert_words(words, columns, before_.data());
            steps.run(0, columns, i.source == Source::kInteger ? before_.data() : words, x);
        }

        float* const maxima = parameter_.data() + size_t(uint16_t(i.max_to + tile * RowMaxima::count(i))) * kRows;
        if (i.maximum != Maximum::kNone) maxima_.begin(i, maxima);

        switch (i.function) {
            case Function::kNone: break;
            case Function::kRelu: Pass::rectify(columns, x); break;
            case Function::kScore: {
                const int32_t first = (int32_t(i.first_row << 12) >> 12) + int32_t(tile) * kRows;
                // Hidden scores count with the exponent of the lower limit, and leave as -infinity.
                if (i.mask == Mask::kCausal) Pass::hide(columns, first, int32_t(i.window), x);
                maxima_.score(i, x);
                if (i.mask == Mask::kCausal) Pass::hide(columns, first, int32_t(i.window), x);
                break;
            }
            case Function::kExp2: {
                int32_t n[kRows];
                std::memcpy(n, lane0, sizeof n);
                Pass::exponential(table_for(i), columns, n, x);
                break;
            }
            default:
                if (i.function == Function::kRecip) note_reciprocals(x, columns * kRows);
                std::memcpy(before_.data(), x, columns * kRows * sizeof(float));
                apply(table_for(i), columns * kRows, before_.data(), x);
        }

        if (i.sum) Pass::sum(columns, x, sums_);
        const bool third = i.mul3 != ThirdMultiply::kNone;
        if (third && i.tap == Tap::kBefore) std::memcpy(before_.data(), x, columns * kRows * sizeof(float));
        if (i.mul3 == ThirdMultiply::kColumn2) Pass::multiply_columns(columns, column2, x);
        if (i.mul3 == ThirdMultiply::kY) Pass::multiply_elements(columns, y, x);
        if (i.maximum == Maximum::kAbsolute) maxima_.absolute(i, x);

        const float* result = third && i.tap == Tap::kBefore ? before_.data() : x;
        write(i, tile, result);
        if (i.select) index.select(i, result);
        if (i.sum) std::memcpy(&parameter_[size_t(uint16_t(i.sum_to + tile)) * kRows], sums_, sizeof sums_);
        if (i.maximum != Maximum::kNone) maxima_.end(maxima);
    }

    void write(const isa::Vector& i, uint32_t tile, const float* x) {
        const size_t columns = i.columns, to = uint16_t(i.to + tile * i.to_stride);
        switch (i.destination) {
            case Destination::kNone: return;
            case Destination::kVector: std::memcpy(&vector_[to * kRows], x, columns * kRows * sizeof(float)); return;
            case Destination::kParameter: std::memcpy(&parameter_[to * kRows], x, columns * kRows * sizeof(float)); return;
            default: break;
        }
        Pass::round(columns, x, rounded_.data());
        if (i.destination == Destination::kActivation) {
            std::memcpy(&activation_[to * kRows], rounded_.data(), columns * kRows);
            zero_.written(activation_.data(), uint32_t(to), uint32_t(columns));
        }
        if (i.destination == Destination::kWeight) std::memcpy(&weight_[to * kRows], rounded_.data(), columns * kRows);
        if (i.destination == Destination::kBytes) widen(rounded_.data(), columns, to);
        const bool bytes = i.destination == Destination::kBytesTransposed;
        if (i.destination == Destination::kWeightTransposed || bytes)
            for (size_t group = 0; group * kRows < columns; group++) {
                uint8_t turned[kRows][kRows];
                for (int r = 0; r < kRows; r++)
                    for (size_t c = 0; c < kRows; c++) {
                        const size_t j = group * kRows + c;
                        turned[r][c] = j < columns ? rounded_[j * kRows + r] : uint8_t(0);
                    }
                const size_t start = uint16_t(to + group * i.to_group);
                if (bytes) widen(&turned[0][0], kRows, start);
                else std::memcpy(&weight_[start * kRows], turned, sizeof turned);
            }
    }

    // Words of bytes to VECTOR words, one byte in each lane.
    void widen(const uint8_t* bytes, size_t words, size_t start) {
        for (size_t n = 0; n < words * kRows; n++) vector_[start * kRows + n] = float_of(bytes[n]);
    }

    std::vector<int8_t> activation_, weight_;
    ZeroWords zero_;
    std::vector<float> vector_, parameter_;
    std::vector<Table> tables_;
    TileQueue tiles_;
    Products products_;
    RowMaxima maxima_;
    std::vector<float> x_, before_;
    std::vector<uint8_t> rounded_;
    float sums_[kRows];
};

}  // namespace lockstep
