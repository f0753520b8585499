// What happened in a core and when: one list of events, of the same form from the RTL and from the timing model.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep {

// Python reads these bytes: see recording.py.
struct Event {
    uint64_t time;   // cycle of the counter CYCLES
    uint32_t value;  // SPAN: length in cycles; ASK: beats; TILES: how many; WRITE: address
    uint8_t kind, unit, state, unused;
};
static_assert(sizeof(Event) == 16);

enum EventKind : uint8_t {
    kAccept,  // a unit takes its next instruction
    kEnd,     // a unit is done with its oldest instruction, and gives its tokens
    kSpan,    // a unit is in a state for `value` cycles; not told where it is idle
    kAsk,     // a burst's address is taken by the bus
    kFirst,   // its first beat
    kLast,    // behind its last beat
    kTiles,   // complete result tiles in the accumulator queue, from now on
    kWrite,   // a beat is written to byte address `value` (the RTL alone tells this)
};

// As the counters of units are ordered.
enum UnitState : uint8_t { kBusy, kWaitToken, kWaitData, kIdle };

// Who asks for a burst: a unit, or this.
constexpr uint8_t kFetch = 4;

struct Recording {
    bool on = false;
    std::vector<Event> events;

    void add(uint64_t time, EventKind kind, unsigned unit, uint64_t value = 0, UnitState state = kIdle) {
        events.push_back({time, uint32_t(value), kind, uint8_t(unit), state, 0});
    }
};

}  // namespace lockstep
