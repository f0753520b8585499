// What the RTL takes from one event to the next, and how much it has under way: what the timing model goes by.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "instructions.hpp"  // generated

namespace lockstep {

// Latencies in cycles.
struct Latencies {
    using Time = int64_t;

    static constexpr Time kFetchPipeline = 5;   // address out, last beat to the buffer's output
    static constexpr Time kFetchTurn = 1;       // of these, room in the buffer to the address
    static constexpr Time kQueueLatency = 3;    // dispatcher to the head of a unit's queue
    static constexpr Time kTokenLatency = 3;    // done to the accepted instruction that waited for it
    // A fetch: its beats, and the instructions that it brings.
    static constexpr Time kFetchBeats = std::max(1u, isa::kInstructionBytes / isa::kBusBytes);
    static constexpr size_t kFetched = std::max(1u, isa::kBusBytes / isa::kInstructionBytes);
    static constexpr Time kOperandWords = 4 * isa::kOperands / isa::kInstructionBytes / kFetched;  // fetches of operands
    static constexpr Time kOperandTurn = 2;     // descriptor to the operands' first address
    static constexpr Time kSelect = 2;          // an instruction with operands, and one more for each
    static constexpr Time kSkipLatency = 2;     // an instruction that does nothing, from its tokens to those it gives
    static constexpr Time kSettle = 2;          // last done to the fence
    static constexpr Time kArrayLatency = 4;    // last operand read to the array's first result, memory included
    static constexpr Time kPackedStart = 3;     // what the first step of packed weights comes later than of others
    static constexpr Time kPackedAhead = 3;     // but not where it was to be seen so long before it was accepted
    static constexpr Time kLoadLatency = 1;     // last beat to done
    static constexpr Time kGatherStart = 4;     // what the first burst of a LOAD that gathers is later than of others
    static constexpr size_t kFetchAhead = 8, kLoadsInFlight = 5, kOutstandingBursts = 4;
    static constexpr size_t kStoresInFlight = 8, kWaitingStores = 4, kOutstandingStores = 16;
    static constexpr Time kBufferedBeats = 2 * 4 * isa::kRows / isa::kBusBytes;  // two words on the way to the bus
    static constexpr uint32_t kBurstBeats = 32;
    static constexpr size_t kReadsInMemory = 8;  // of the memory model
};

}  // namespace lockstep
