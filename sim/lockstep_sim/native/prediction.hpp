// What the timing model says of a program, and what it is told of VECTOR instructions.
#pragma once

#include <cstdint>

namespace lockstep {

// Cycles of a VECTOR instruction's row tiles and tail, as the RTL's own formula gives them.
struct VectorShape {
    int32_t first_row, other_row, tail, column;
};

struct UnitCycles {
    uint64_t busy = 0, wait_token = 0, wait_data = 0, idle = 0;
};

struct Prediction {
    uint64_t cycles = 0, instructions = 0, read_beats = 0, write_beats = 0, mac_cycles = 0, skipped_chunks = 0;
    UnitCycles units[4];
};

}  // namespace lockstep
