// Weights as the words of lockstep_isa/weights.py pack them, and what the array makes of any bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "instructions.hpp"  // generated

namespace lockstep {

// How a MATRIX instruction's weights are packed.
struct WeightFormat {
    uint32_t group = 0;  // inputs that share a multiplier, 0: int8
    uint32_t kept = 4;   // values that are there of each four
    uint32_t rate = 1;   // inputs that the array takes in one step

    WeightFormat() = default;
    explicit WeightFormat(const isa::Matrix& i)
        : group(isa::kWeightGroup[uint32_t(i.weights)]),
          kept(isa::kKeptOfFour[uint32_t(i.sparsity)]),
          rate(isa::kInputsPerStep[uint32_t(i.weights)][uint32_t(i.sparsity)]) {}

    bool packed() const { return group != 0 || kept != 4; }

    // Steps and WEIGHT words of a tile whose channels have `depth` inputs.
    uint32_t steps(uint32_t depth) const { return (depth + rate - 1) / rate; }
    uint32_t words(uint32_t depth) const {
        const uint32_t values = depth * kept / 4, side = kept == 4 ? 0 : values / 4;
        return group ? values / 2 + side + depth / group : values + side;
    }

    // top[k][c] for k < depth out of a tile's words, each with a byte for every channel c. Inputs behind the last whole
    // group are zero.
    template <int Channels>
    void expand(const uint8_t* word, uint32_t depth, int16_t* top) const {
        using Row = int16_t[Channels];
        Row* rows = reinterpret_cast<Row*>(top);
        std::fill_n(top, size_t(depth) * Channels, int16_t(0));
        const uint32_t length = group ? group : depth;
        for (uint32_t first = 0; first + length <= depth; first += length) {
            Row multiplier;
            if (group) {
                for (int c = 0; c < Channels; c++) multiplier[c] = word[c] & 31;
                word += Channels;
            }
            const uint32_t values = length * kept / 4, together = kept == 4 ? group ? 2 : 1 : 4;
            for (uint32_t v = 0; v + together <= values; v += together) {
                const uint8_t* positions = word;
                if (kept != 4) word += Channels;
                for (uint32_t n = 0; n < together; n++) {
                    Row value;
                    for (int c = 0; c < Channels; c++) {
                        // A byte is first + 16 * second.
                        const int8_t first_value = int8_t(word[c] << 4) >> 4;
                        const int8_t int4 = n % 2 ? int8_t(word[c] - first_value) >> 4 : first_value;
                        value[c] = group ? int8_t(int4 * multiplier[c]) : int8_t(word[c]);
                    }
                    if (!group || n % 2) word += Channels;
                    Row* four = rows + first + (v + n) / kept * 4;
                    if (kept == 4) four += (v + n) % 4;
                    for (uint32_t at = 0; at < (kept == 4 ? 1 : 4); at++)
                        for (int c = 0; c < Channels; c++) {
                            const bool here = kept == 4 || (positions[c] >> 2 * n & 3) == int(at);
                            four[at][c] = int16_t(four[at][c] + (here ? value[c] : 0));
                        }
                }
            }
        }
    }
};

}  // namespace lockstep
