// Which words of ACTIVATION are zero, and the chunks that MATRIX passes over by that: lockstep_isa/zero_skipping.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instructions.hpp"  // generated
#include "packed_weights.hpp"

namespace lockstep {

// What stands behind a chunk that is multiplied: chunks that are passed over, and whether the tile has no other behind.
struct Jump {
    uint16_t zeros;
    bool end;
};

class ZeroWords {
  public:
    ZeroWords() : zero_(isa::kZeroSkipping ? isa::kActivationWords : 0) {}

    // `count` words of R bytes were written from word `first` on.
    void written(const int8_t* words, uint32_t first, uint32_t count) {
        if (!isa::kZeroSkipping) return;
        for (uint32_t n = first; n < first + count; n++) {
            const int8_t* word = words + size_t(n) * isa::kRows;
            zero_[n] = std::all_of(word, word + isa::kRows, [](int8_t byte) { return byte == 0; });
        }
    }

    // The jumps of all tiles of an instruction whose tiles are in bounds, tile by tile; none where it skips no chunk.
    void find(const isa::Matrix& i, std::vector<Jump>& jumps) const {
        constexpr uint32_t rows = isa::kRows;
        jumps.clear();
        if (!isa::kZeroSkipping || WeightFormat(i).packed() || i.depth < 2 * rows || (i.a | i.a_outer | i.a_inner) % rows)
            return;
        bool any = false;
        for (uint32_t outer = 0; outer < i.outer; outer++)
            for (uint32_t inner = 0; inner < i.inner; inner++) {
                const uint32_t a = uint16_t(i.a + outer * i.a_outer + inner * i.a_inner);
                uint16_t zeros = 0;
                // The first chunk is always multiplied.
                for (uint32_t chunk = 1; chunk < i.depth / rows; chunk++) {
                    const auto word = zero_.begin() + a + chunk * rows;
                    if (std::all_of(word, word + rows, [](uint8_t zero) { return zero != 0; })) zeros++, any = true;
                    else jumps.push_back({zeros, false}), zeros = 0;
                }
                jumps.push_back({zeros, true});
            }
        if (!any) jumps.clear();
    }

  private:
    std::vector<uint8_t> zero_;  // of each word: it was written as zeros
};

}  // namespace lockstep
