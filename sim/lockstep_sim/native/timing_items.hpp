// What the timing model knows of each instruction, and of each unit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "chunk_search.hpp"
#include "latencies.hpp"
#include "prediction.hpp"

namespace lockstep {

struct TimedItem {
    using Time = Latencies::Time;

    int unit;
    uint32_t wait, signal, selectors;
    bool idle = false;
    uint32_t address = 0, stride = 0, rows = 0, beats = 0, words = 0, steps = 0, tiles = 0, columns = 0;
    uint32_t format = 0;  // of the weights of MATRIX
    Time prologue = 0;  // of MATRIX, in front of its first tile; of LOAD, in front of its first burst
    size_t gathered = SIZE_MAX;  // of a LOAD that gathers: where its rows' numbers are
    size_t jump = ChunkSearch::kNone;  // the next one
    uint32_t writes = 0;  // cycles of a row in which LOAD writes and takes no beat
    VectorShape shape{};
    Time dispatched = 0, accepted = -1, start = -1, end = -1;
    Time waits = 0;       // from when on it waits for tokens
    Time words_read = 0;  // of STORE: when its words have been read
    // Progress of an instruction that waits in its middle.
    uint32_t row = 0, tile = 0;
    Time now = 0;
};

struct TimedLane {
    using Time = Latencies::Time;

    std::vector<size_t> queue;  // all items of the unit so far, in order
    size_t begun = 0;           // the first that has not been accepted
    size_t next = 0;            // the first that has not ended
    Time free = 0;              // when the unit can accept the next one
    Time ended = 0;             // when all of its items so far have ended
    std::vector<Time> given[4]; // times of tokens given to each unit
    size_t taken[4] = {};       // tokens taken from each unit
};

}  // namespace lockstep
