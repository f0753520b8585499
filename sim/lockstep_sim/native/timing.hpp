// The timing model: when each instruction of a program starts and ends on the RTL, without simulating the RTL.
//
// Units are in order, and whatever one waits for (a token, a result tile, room in the accumulator queue, a place in a
// queue) has one time, so times can be computed unit by unit in any order that respects the waiting: no events, no
// cycles, a few operations per result tile and per burst. What it leaves out: bus beats of instruction fetch that meet
// beats of LOAD are charged one by one, beats of LOAD and STORE that meet delay neither, and the phase of refresh is
// that of a core that starts in cycle 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instructions.hpp"  // generated
#include "latencies.hpp"
#include "packed_weights.hpp"
#include "selection.hpp"
#include "timing_recorder.hpp"

namespace lockstep {

struct BusTiming {
    uint32_t latency, refresh_interval, refresh_cycles;
};

// Cycles of a VECTOR instruction's row tiles and tail, as the RTL's own formula gives them.
struct VectorShape {
    int32_t first_row, other_row, tail, column;
};

struct UnitCycles {
    uint64_t busy = 0, wait_token = 0, wait_data = 0, idle = 0;
};

struct Prediction {
    uint64_t cycles = 0, instructions = 0, read_beats = 0, write_beats = 0, mac_cycles = 0;
    UnitCycles units[4];
};

class TimingModel : Latencies {
  public:
    using Latencies::Time;

    // `recording`, where there is one, is told what happens, in the order of its computation and not of time.
    TimingModel(BusTiming bus, bool operands, Recording* recording = nullptr)
        : bus_(bus), operands_(operands), record_(recording) {}

    // An instruction that only exchanges its tokens.
    template <class Type>
    void add_nothing(const Type& i) {
        add(i).idle = true;
    }

    void add_load(const isa::Load& i, const IndexMemory& index) {
        const uint32_t word = i.memory == isa::Memory::kTable ? isa::kTableEntryBytes
                              : i.memory == isa::Memory::kVector || i.memory == isa::Memory::kParameter ? 4 * isa::kRows
                                                                                                        : isa::kRows;
        Item& item = add(i);
        item.address = i.address, item.stride = i.stride, item.rows = i.rows, item.beats = whole_beats(i.words * word);
        // Of a beat of table entries one is written in a cycle.
        if (i.memory == isa::Memory::kTable && word < isa::kBusBytes) item.writes = i.words - item.beats;
        result_.read_beats += uint64_t(item.rows) * item.beats;
        if (i.gather) item.prologue = kGatherStart, item.gathered = gathered_.size(), index.append_rows(i, gathered_);
    }
    void add_store(const isa::Store& i) {
        Item& item = add(i);
        item.address = i.address, item.stride = i.stride, item.rows = i.rows;
        const uint32_t word = (i.bytes ? 1 : 4) * isa::kRows;
        item.beats = whole_beats(i.words * word);
        // Words that share a beat are read as one.
        item.words = std::min(i.words, item.beats);
        result_.write_beats += uint64_t(item.rows) * item.beats;
    }
    void add_matrix(const isa::Matrix& i) {
        Item& item = add(i);
        const WeightFormat format(i);
        item.steps = format.steps(i.depth), item.tiles = i.outer * i.inner;
        item.prologue = format.packed() ? kPackedStart : 0;
        result_.mac_cycles += uint64_t(item.steps) * item.tiles;
    }
    void add_vector(const isa::Vector& i, const VectorShape& shape) {
        Item& item = add(i);
        item.shape = shape, item.rows = i.tiles, item.columns = i.columns;
        item.tiles = i.source == isa::Source::kAccumulator ? (i.columns + isa::kRows - 1) / isa::kRows : 0;
    }

    // Times of everything added so far; false where the program waits for itself.
    bool solve() {
        const Time fetch = kFetchBeats;
        // Doorbell, descriptor, check, first instruction.
        Time now = 2 * (Time(bus_.latency) + kFetchPipeline + fetch);
        if (operands_) {
            now += kOperandTurn + kOperandWords * fetch;
            result_.read_beats += uint64_t(kOperandWords * fetch);
        }
        bus_free_ = now;
        if (record_.on()) record_start(fetch);
        Time arrived = now;
        size_t dispatched = 0, done = 0;
        std::vector<Time> dispatch_times;
        dispatch_times.reserve(items_.size());
        while (done < items_.size()) {
            bool progress = false;
            while (dispatched < items_.size()) {
                Item& item = items_[dispatched];
                Lane& lane = lanes_[item.unit];
                // The queue holds kQueueDepth waiting instructions; a place is free once an earlier one was accepted.
                Time room = 0;
                if (lane.queue.size() >= isa::kQueueDepth) {
                    const size_t before = lane.queue.size() - isa::kQueueDepth;
                    if (before >= lane.next) break;
                    room = items_[lane.queue[before]].start + 1;
                }
                // Fetches run ahead by eight instructions. Each fetch takes its beats, and room for it is where all
                // instructions of an earlier one have been dispatched.
                if (dispatched % kFetched == 0) {
                    if (dispatched) arrived += fetch;
                    if (dispatched >= kFetchAhead)
                        arrived = std::max(arrived, dispatch_times[dispatched - kFetchAhead + kFetched - 1] +
                                                        bus_.latency + kFetchPipeline + fetch);
                }
                now = std::max({now + 1, room, arrived}) + (item.selectors ? kSelect + item.selectors : 0);
                dispatch_times.push_back(now);
                if (dispatched % kFetched == 0) fetched_.push_back(now);
                item.dispatched = now + kQueueLatency;
                lane.queue.push_back(dispatched++);
                progress = true;
            }
            for (int unit = 0; unit < 4; unit++)
                while (lanes_[unit].next < lanes_[unit].queue.size() && advance(unit)) {
                    if (partial_) {
                        progress = true;
                        break;
                    }
                    done++;
                    progress = true;
                }
            if (!progress) return false;
        }
        for (const Item& item : items_) result_.cycles = std::max<uint64_t>(result_.cycles, uint64_t(item.end + kSettle));
        result_.instructions = items_.size();
        result_.read_beats += ((items_.size() + kFetched - 1) / kFetched + 1) * uint64_t(fetch);
        if (record_.on()) record_rest();
        for (UnitCycles& u : result_.units) u.idle = result_.cycles - u.busy - u.wait_token - u.wait_data;
        return true;
    }

    // Where a program that waits for itself is stuck: as in the RTL, the last unit listed that still has work.
    isa::Unit stuck_unit() const {
        int unit = 0;
        for (int u = 0; u < 4; u++)
            if (lanes_[u].next < lanes_[u].queue.size()) unit = u;
        return isa::Unit(unit);
    }
    uint32_t stuck_instruction() const {
        const Lane& lane = lanes_[int(stuck_unit())];
        return lane.next < lane.queue.size() ? uint32_t(lane.queue[lane.next]) : 0;
    }

    const Prediction& prediction() const { return result_; }

  private:
    struct Item {
        int unit;
        uint32_t wait, signal, selectors;
        bool idle = false;
        uint32_t address = 0, stride = 0, rows = 0, beats = 0, words = 0, steps = 0, tiles = 0, columns = 0;
        Time prologue = 0;  // of MATRIX, in front of its first tile; of LOAD, in front of its first burst
        size_t gathered = SIZE_MAX;  // of a LOAD that gathers: where its rows' numbers are
        uint32_t writes = 0;  // cycles of a row in which LOAD writes and takes no beat
        VectorShape shape{};
        Time dispatched = 0, accepted = -1, start = -1, end = -1;
        // Progress of an instruction that waits in its middle.
        uint32_t row = 0, tile = 0;
        Time now = 0;
    };
    struct Lane {
        std::vector<size_t> queue;  // all items of the unit so far, in order
        size_t next = 0;            // the first that has not ended
        Time free = 0;              // when the unit can accept the next one
        Time ended = 0;             // when all of its items so far have ended
        std::vector<Time> given[4]; // times of tokens given to each unit
        size_t taken[4] = {};       // tokens taken from each unit
    };

    struct Cycles {
        Time begin, end;
    };

    template <class Type>
    Item& add(const Type& i) {
        items_.push_back({int(Type::kUnit), i.wait_, i.signal_, i.operand_count()});
        return items_.back();
    }

    // Try to carry the next instruction of a unit further. False: it waits for something without a time yet.
    // `partial_` is set where it went on but did not end.
    bool advance(int unit) {
        Lane& lane = lanes_[unit];
        Item& item = items_[lane.queue[lane.next]];
        UnitCycles& cycles = result_.units[unit];
        partial_ = false;
        if (item.start < 0) {
            Time ready = 0;
            for (int source = 0; source < 4; source++)
                if (item.wait >> source & 1) {
                    const auto& given = lanes_[source].given[unit];
                    if (lane.taken[source] >= given.size()) return false;
                    ready = std::max(ready, given[lane.taken[source]] + kTokenLatency);
                }
            for (int source = 0; source < 4; source++) lane.taken[source] += item.wait >> source & 1;
            const Time earliest = std::max(item.dispatched, lane.free);
            item.start = item.now = std::max(earliest, ready);
            // A unit that is at work counts as that, and not as waiting for its next instruction.
            const Time waits = std::max(earliest, lane.ended);
            if (waits < item.start) cycles.wait_token += uint64_t(item.start - waits);
            record_.span(unit, kWaitToken, waits, item.start);
            item.accepted = item.start;
        }
        const uint32_t row = item.row, tile = item.tile;
        if (!work(item, lane, cycles)) {
            partial_ = item.row != row || item.tile != tile;
            return partial_;
        }
        for (int target = 0; target < 4; target++)
            if (item.signal >> target & 1) lane.given[target].push_back(item.end);
        record_.instruction(unit, item.accepted, item.end);
        lane.next++;
        lane.ended = std::max(lane.ended, item.end);
        return true;
    }

    // What the unit does with an instruction that may run; false where it stops in its middle.
    bool work(Item& item, Lane& lane, UnitCycles& cycles) {
        if (item.idle) {
            const Time begin = std::max(item.start, lane.ended);
            item.end = std::max(item.start + kSkipLatency, lane.ended + 1);
            lane.free = item.start + 2;
            cycles.busy += uint64_t(item.end - begin);
            record_.span(item.unit, kBusy, begin, item.end);
            return true;
        }
        switch (isa::Unit(item.unit)) {
            case isa::Unit::kLoad: load(item, lane, cycles); return true;
            case isa::Unit::kStore: store(item, lane, cycles); return true;
            case isa::Unit::kMatrix: return matrix(item, lane, cycles);
            case isa::Unit::kVector: return vector(item, lane, cycles);
        }
        return true;
    }

    // The cycle behind `beats` bus beats from `now` on, refresh included.
    Time transfer(Time now, uint64_t beats) const {
        if (!bus_.refresh_interval) return now + Time(beats);
        const Time interval = bus_.refresh_interval, rest = bus_.refresh_cycles, useful = interval - rest;
        auto phase = now % interval;
        if (phase < rest) now += rest - phase, phase = rest;
        const Time into = phase - rest + Time(beats);
        if (beats == 0) return now;
        return now - (phase - rest) + (into - 1) / useful * interval + (into - 1) % useful + 1;
    }

    // Instruction words that were fetched until `now` took their beats.
    void charge_fetches(Time now) {
        const uint64_t beats = kFetchBeats;
        for (; charged_ < fetched_.size() && fetched_[charged_] <= now; charged_++) {
            const Time begin = bus_free_;
            bus_free_ = transfer(bus_free_, beats);
            record_.burst(kFetch, begin - bus_.latency, begin, bus_free_, beats);
        }
    }

    // The end of a burst of STORE, `end` if it is alone, with the instruction words that arrive during it: beat by beat
    // both take turns.
    Time take_turns(Time end, uint64_t length) {
        while (length) {
            if (!fetch_left_) {
                if (charged_ == fetched_.size() || fetched_[charged_] > end) break;
                record_.burst(kFetch, end - bus_.latency, end, end + kFetchBeats, uint64_t(kFetchBeats));
                charged_++, fetch_left_ = uint64_t(kFetchBeats);
            }
            const uint64_t beats = std::min(length, fetch_left_);
            end = transfer(end, beats);
            length -= beats, fetch_left_ -= beats;
        }
        return end;
    }

    static constexpr uint32_t whole_beats(uint32_t bytes) { return (bytes + isa::kBusBytes - 1) / isa::kBusBytes; }
    // Beats of the VECTOR unit that take `columns` columns.
    static constexpr Time column_beats(Time columns) { return (columns + isa::kColumnsPerBeat - 1) / isa::kColumnsPerBeat; }

    template <class Visit>
    void bursts(const Item& item, Visit visit) const {
        for (uint32_t row = 0; row < item.rows; row++) {
            const uint32_t number = item.gathered == SIZE_MAX ? row : gathered_[item.gathered + row];
            uint32_t beat = (item.address + number * item.stride) / isa::kBusBytes;
            for (uint32_t left = item.beats; left;) {
                const uint32_t length = std::min(left, kBurstBeats - beat % kBurstBeats);
                visit(length);
                beat += length, left -= length;
            }
        }
    }

    void load(Item& item, Lane& lane, UnitCycles& cycles) {
        if (lane.next >= kLoadsInFlight)
            item.start = std::max(item.start, items_[lane.queue[lane.next - kLoadsInFlight]].end + 1);
        Time asked = item.start + 1 + item.prologue;
        const Time begin = std::max(item.start, lane.ended);
        Time told = begin;
        bursts(item, [&](uint32_t length) {
            if (burst_ends_.size() >= kOutstandingBursts)
                asked = std::max(asked, burst_ends_[burst_ends_.size() - kOutstandingBursts] + 1);
            charge_fetches(asked);
            const Time first = std::max(asked + Time(bus_.latency), bus_free_);
            bus_free_ = transfer(first, length);
            record_.burst(item.unit, asked, first, bus_free_, length);
            if (record_.on()) told = record_beats(item.unit, told, first, length);
            burst_ends_.push_back(bus_free_);
            asked++;
        });
        bus_free_ += Time(item.rows) * item.writes;
        item.end = bus_free_ + kLoadLatency;
        lane.free = asked;
        record_.span(item.unit, kWaitData, told, item.end);
        const uint64_t useful = uint64_t(item.rows) * item.beats;
        const uint64_t span = item.end > begin ? uint64_t(item.end - begin) : 0;
        cycles.busy += std::min(useful, span);
        cycles.wait_data += span - std::min(useful, span);
    }

    void store(Item& item, Lane& lane, UnitCycles& cycles) {
        if (lane.next >= kStoresInFlight)
            item.start = std::max(item.start, items_[lane.queue[lane.next - kStoresInFlight]].end + 1);
        item.accepted = item.start;
        const Time begin = std::max(item.start, lane.ended), reads = std::max(item.start, store_read_);
        Time cut = item.start - 1;
        bursts(item, [&](uint32_t length) {
            // Bursts are announced up to kWaitingStores ahead of the data, and kOutstandingStores ahead of the answers.
            const size_t n = store_ends_.size();
            cut = std::max(cut + 1, n > 1 ? store_asked_[n - 2] : 0);
            Time asked = cut + 2;
            if (n) asked = std::max(asked, store_asked_[n - 1] + 1);
            if (n >= kWaitingStores) asked = std::max(asked, store_ends_[n - kWaitingStores]);
            if (n >= kOutstandingStores) asked = std::max(asked, store_ends_[n - kOutstandingStores] + Time(bus_.latency));
            const Time first = std::max(asked + 1, n ? store_ends_[n - 1] : 0);
            charge_fetches(first);
            Time end = transfer(first, length);
            record_.burst(item.unit, asked, first, end, length);
            if (n && first > store_ends_[n - 1]) fetch_left_ = 0;
            end = take_turns(end, length);
            store_asked_.push_back(asked), store_ends_.push_back(end);
            if (record_.on()) beats(first, length, [&](Time from, Time to) { store_beats_.push_back({from, to}); });
        });
        const Time sent = store_ends_.back();
        // The next one is accepted when this one's words are being read, and its bursts are all cut.
        store_read_ = std::max(reads + Time(item.rows * item.words), sent - kBufferedBeats);
        lane.free = std::max(reads, cut) + 2;
        item.end = sent + Time(bus_.latency);
        if (record_.on()) store_runs_.push_back({begin, item.end});
        const uint64_t useful = uint64_t(item.rows) * item.beats + 1;  // and the cycle in which it is done
        // Beats may have been sent while the one before was not yet answered, so this difference may be negative.
        cycles.busy += useful, cycles.wait_data += uint64_t(item.end - begin) - useful;
    }

    bool matrix(Item& item, Lane& lane, UnitCycles& cycles) {
        const Time period = std::max<Time>(item.steps, isa::kRows);
        for (; item.tile < item.tiles; item.tile++) {
            const size_t number = available_.size();
            if (number >= isa::kAccumulatorTiles) {
                const size_t before = number - isa::kAccumulatorTiles;
                if (before >= popped_.size()) return false;
                if (popped_[before] > item.now) {
                    cycles.wait_data += uint64_t(popped_[before] - item.now);
                    record_.span(item.unit, kWaitData, item.now, popped_[before]);
                    item.now = popped_[before];
                }
            }
            work_on(item, cycles, (item.tile ? 0 : item.prologue) + period);
            available_.push_back(item.now + kArrayLatency + 2 * isa::kRows - 2);
        }
        item.end = item.now;  // done pulses in the last cycle of the last tile
        lane.free = item.now;
        return true;
    }

    bool vector(Item& item, Lane& lane, UnitCycles& cycles) {
        for (; item.row < item.rows; item.row++) {
            const Time row_cycles = item.row ? item.shape.other_row : item.shape.first_row;
            if (!item.tiles) {
                work_on(item, cycles, row_cycles);
                continue;
            }
            const Time prologue = row_cycles - column_beats(item.columns) * item.shape.column;
            if (item.tile == 0) work_on(item, cycles, prologue);
            for (; item.tile < item.tiles; item.tile++) {
                const size_t number = popped_.size();
                if (number >= available_.size()) return false;
                if (available_[number] > item.now) {
                    cycles.wait_data += uint64_t(available_[number] - item.now);
                    record_.span(item.unit, kWaitData, item.now, available_[number]);
                    item.now = available_[number];
                }
                const Time columns = std::min<Time>(isa::kRows, Time(item.columns) - Time(item.tile) * isa::kRows);
                work_on(item, cycles, column_beats(columns) * item.shape.column);
                popped_.push_back(item.now);
            }
            item.tile = 0;
        }
        work_on(item, cycles, item.shape.tail);
        item.end = item.now;
        lane.free = item.end + 1;
        return true;
    }

    void work_on(Item& item, UnitCycles& cycles, Time length) {
        record_.span(item.unit, kBusy, item.now, item.now + length);
        item.now += length, cycles.busy += uint64_t(length);
    }

    // --- What a recording is told ---

    // The cycles of `count` beats from `first` on, refresh left out.
    template <class Visit>
    void beats(Time first, uint64_t count, Visit visit) const {
        while (count) {
            const Time begin = transfer(first, 1) - 1;
            const Time rest = bus_.refresh_interval ? bus_.refresh_interval - begin % bus_.refresh_interval : Time(count);
            const Time end = begin + std::min(Time(count), rest);
            visit(begin, end);
            count -= uint64_t(end - begin), first = end;
        }
    }

    // Busy in the cycles of beats, waiting for data in the others; nothing before `told`.
    Time record_beats(int unit, Time told, Time first, uint64_t count) {
        beats(first, count, [&](Time begin, Time end) {
            record_.span(unit, kWaitData, told, begin);
            record_.span(unit, kBusy, std::max(told, begin), end);
            told = std::max(told, end);
        });
        return told;
    }

    void record_start(Time fetch) {
        const Time latency = bus_.latency;
        record_.burst(kFetch, 1, 1 + latency, 1 + latency + fetch, uint64_t(fetch));
        const Time beats = kOperandWords * fetch, begin = bus_free_ - beats;
        if (operands_) record_.burst(kFetch, begin - latency, begin, bus_free_, uint64_t(beats));
    }

    // Busy in the cycles of STORE's beats, waiting for data in the others in which it has an instruction.
    void record_store() {
        const int unit = int(isa::Unit::kStore);
        size_t n = 0;
        for (const Cycles& run : store_runs_) {
            Time told = run.begin;
            for (; n < store_beats_.size() && store_beats_[n].begin < run.end; n++) {
                const Cycles& sent = store_beats_[n];
                record_.span(unit, kWaitData, told, sent.begin);
                record_.span(unit, kBusy, std::max(told, sent.begin), std::min(sent.end, run.end));
                told = std::max(told, sent.end);
                if (sent.end > run.end) break;
            }
            record_.span(unit, kWaitData, told, run.end - 1);
            record_.span(unit, kBusy, std::max(told, run.end - 1), run.end);
        }
    }

    // Instruction words that met no load, and what is still open.
    void record_rest() {
        const Time fetch = Time(kFetchBeats);
        for (; charged_ < fetched_.size(); charged_++) {
            const Time end = std::max<Time>(fetched_[charged_] - 2, 0);
            record_.burst(kFetch, end - fetch - bus_.latency, end - fetch, end, uint64_t(fetch));
        }
        record_store();
        record_.finish(int(isa::Unit::kMatrix), available_, popped_);
    }

    BusTiming bus_;
    bool operands_;
    TimingRecorder record_;
    std::vector<Item> items_;
    std::vector<uint32_t> gathered_;  // rows of device memory, of all LOADs that gather
    Lane lanes_[4];
    std::vector<Time> available_, popped_;  // result tiles: complete, discarded
    std::vector<Time> burst_ends_, fetched_;
    std::vector<Time> store_asked_, store_ends_;    // STORE's bursts: announced, and behind their last beats
    std::vector<Cycles> store_beats_, store_runs_;  // for a recording: STORE's beats, and where it has an instruction
    Time store_read_ = 0;                           // when the words of STORE's newest instruction have been read
    size_t charged_ = 0;
    uint64_t fetch_left_ = 0;                       // beats of the last fetch that STORE's next burst meets
    Time bus_free_ = 0;
    bool partial_ = false;
    Prediction result_;
};

}  // namespace lockstep
