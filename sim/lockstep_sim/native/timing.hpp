// The timing model: when each instruction of a program starts and ends on the RTL, without simulating the RTL.
//
// Units are in order, and whatever one waits for (a token, a result tile, room in the accumulator queue, a place in a
// queue) has one time, so times can be computed unit by unit in any order that respects the waiting: no cycles, a few
// operations per result tile and per burst. Only the bus has an order of its own: a burst is sent when no unit can go on
// without it, so that everything which the bus does before is known. What it leaves out: cycles in which a scratchpad is
// busy delay neither LOAD nor STORE, and the phase of refresh is that of a core that starts in cycle 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "bus.hpp"
#include "chunk_search.hpp"
#include "instructions.hpp"  // generated
#include "latencies.hpp"
#include "packed_weights.hpp"
#include "prediction.hpp"
#include "requests.hpp"
#include "selection.hpp"
#include "timing_items.hpp"
#include "timing_recorder.hpp"

namespace lockstep {

class TimingModel : Latencies {
  public:
    using Latencies::Time;
    using Unit = isa::Unit;

    // `recording`, where there is one, is told what happens, in the order of its computation and not of time.
    TimingModel(BusTiming bus, bool operands, Recording* recording = nullptr)
        : latency_(bus.latency), bus_(bus, recording != nullptr), operands_(operands), record_(recording) {}

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
    // `jumps`: of the chunks of all tiles, where some are passed over.
    void add_matrix(const isa::Matrix& i, const std::vector<Jump>& jumps) {
        Item& item = add(i);
        const WeightFormat format(i);
        item.steps = format.steps(i.depth), item.tiles = i.outer * i.inner;
        item.prologue = format.packed() ? kPackedStart : 0, item.format = uint32_t(i.weights) << 8 | uint32_t(i.sparsity);
        result_.mac_cycles += uint64_t(item.steps) * item.tiles;
        item.jump = search_.add(jumps, result_);
    }
    void add_vector(const isa::Vector& i, const VectorShape& shape) {
        Item& item = add(i);
        item.shape = shape, item.rows = i.tiles, item.columns = i.columns;
        item.tiles = i.source == isa::Source::kAccumulator ? (i.columns + isa::kRows - 1) / isa::kRows : 0;
    }

    // Times of everything added so far; false where the program waits for itself.
    bool solve() {
        begin();
        while (done_ < items_.size()) {
            bool progress = dispatch();
            for (const Unit unit : {Unit::kMatrix, Unit::kVector})
                while (lane(unit).next < lane(unit).queue.size() && advance(unit)) progress = true;
            progress |= accept_loads();
            progress |= announce_stores();
            if (!progress && !ask_to_read() && !transfer()) return false;
        }
        for (const Item& item : items_) result_.cycles = std::max<uint64_t>(result_.cycles, uint64_t(item.end + kSettle));
        result_.instructions = items_.size();
        result_.read_beats += (fetches() + 1) * uint64_t(kFetchBeats);
        record_.finish(available_, popped_);
        for (UnitCycles& u : result_.units) u.idle = result_.cycles - u.busy - u.wait_token - u.wait_data;
        return true;
    }

    // Where a program that waits for itself is stuck: as in the RTL, the last unit listed that still has work.
    Unit stuck_unit() const {
        int unit = 0;
        for (int u = 0; u < 4; u++)
            if (lanes_[u].next < lanes_[u].queue.size()) unit = u;
        return Unit(unit);
    }
    uint32_t stuck_instruction() const {
        const Lane& lane = lanes_[int(stuck_unit())];
        return lane.next < lane.queue.size() ? uint32_t(lane.queue[lane.next]) : 0;
    }

    const Prediction& prediction() const { return result_; }

  private:
    using Item = TimedItem;
    using Lane = TimedLane;

    template <class Type>
    Item& add(const Type& i) {
        items_.push_back({int(Type::kUnit), i.wait_, i.signal_, i.operand_count()});
        return items_.back();
    }

    Lane& lane(Unit unit) { return lanes_[int(unit)]; }
    Item& item(Unit unit, size_t number) { return items_[lane(unit).queue[number]]; }
    UnitCycles& cycles(const Item& item) { return result_.units[item.unit]; }

    // --- Fetch and dispatch ---

    static constexpr size_t kFetchesAhead = std::max<size_t>(1, kFetchAhead / kFetched);

    size_t fetches() const { return (items_.size() + kFetched - 1) / kFetched; }

    // Doorbell, descriptor, check, operands; the first instructions are asked for.
    void begin() {
        const Time fetch = kFetchBeats;
        now_ = 2 * (latency_ + kFetchPipeline + fetch);
        if (operands_) {
            now_ += kOperandTurn + kOperandWords * fetch;
            result_.read_beats += uint64_t(kOperandWords * fetch);
        }
        if (record_.on()) record_start(fetch);
        fetch_rooms_.assign(kFetchesAhead, now_ - kFetchPipeline - fetch - latency_ + kFetchTurn);
    }

    bool dispatch() {
        const size_t before = dispatched_;
        for (; dispatched_ < items_.size() && dispatched_ / kFetched < arrived_.size(); dispatched_++) {
            Item& item = items_[dispatched_];
            Lane& lane = lanes_[item.unit];
            // The queue holds kQueueDepth waiting instructions; a place is free once an earlier one was accepted.
            Time room = 0;
            if (lane.queue.size() >= isa::kQueueDepth) {
                const Item& earlier = items_[lane.queue[lane.queue.size() - isa::kQueueDepth]];
                if (earlier.start < 0) break;
                room = earlier.start + 1;
            }
            now_ = std::max({now_ + 1, room, arrived_[dispatched_ / kFetched]});
            if (item.selectors) now_ += kSelect + item.selectors;
            item.dispatched = now_ + kQueueLatency;
            lane.queue.push_back(dispatched_);
            // All instructions of a fetch are gone: there is room for another.
            if (dispatched_ % kFetched == kFetched - 1) fetch_rooms_.push_back(now_ + kFetchTurn);
        }
        return dispatched_ > before;
    }

    // --- The order of a unit's instructions ---

    // Accept the next instruction of a unit; false where it waits for something without a time yet.
    bool accept(Unit unit) {
        Lane& lane = lanes_[int(unit)];
        if (lane.begun == lane.queue.size()) return false;
        Item& item = items_[lane.queue[lane.begun]];
        Time ready = 0;
        for (int source = 0; source < 4; source++)
            if (item.wait >> source & 1) {
                const auto& given = lanes_[source].given[int(unit)];
                if (lane.taken[source] >= given.size()) return false;
                ready = std::max(ready, given[lane.taken[source]] + kTokenLatency);
            }
        for (int source = 0; source < 4; source++) lane.taken[source] += item.wait >> source & 1;
        item.waits = std::max(item.dispatched, lane.free);
        item.accepted = item.start = item.now = std::max(item.waits, ready);
        // The first packed weights of an instruction are asked for ahead, behind those of another one of their format.
        if (unit == Unit::kMatrix && !item.idle && std::exchange(format_, item.format) == item.format &&
            item.accepted - std::max(item.dispatched, ready) >= kPackedAhead)
            item.prologue = 0;
        lane.begun++;
        return true;
    }

    // An accepted instruction becomes the oldest of its unit. A unit that is at work counts as that, and not as waiting
    // for its next instruction.
    void become_oldest(Item& item) {
        const Time waits = std::max(item.waits, lanes_[item.unit].ended);
        if (waits < item.accepted) cycles(item).wait_token += uint64_t(item.accepted - waits);
        record_.span(item.unit, kWaitToken, waits, item.accepted);
    }

    void finish(Item& item) {
        Lane& lane = lanes_[item.unit];
        for (int target = 0; target < 4; target++)
            if (item.signal >> target & 1) lane.given[target].push_back(item.end);
        record_.instruction(item.unit, item.accepted, item.end);
        lane.next++, done_++;
        lane.ended = std::max(lane.ended, item.end);
    }

    void finish_idle(Item& item) {
        Lane& lane = lanes_[item.unit];
        become_oldest(item);
        const Time begin = std::max(item.start, lane.ended);
        item.end = std::max(item.start + kSkipLatency, lane.ended + 1);
        lane.free = item.start + 2;
        cycles(item).busy += uint64_t(item.end - begin);
        record_.span(item.unit, kBusy, begin, item.end);
        finish(item);
    }

    // Carry the next instruction of MATRIX or VECTOR further; false where it waits for something without a time yet.
    bool advance(Unit unit) {
        Lane& lane = lanes_[int(unit)];
        const bool begins = lane.begun == lane.next;
        if (begins && !accept(unit)) return false;
        Item& item = items_[lane.queue[lane.next]];
        if (item.idle) return finish_idle(item), true;
        if (begins) become_oldest(item);
        const uint32_t row = item.row, tile = item.tile;
        if (!(unit == Unit::kMatrix ? matrix(item, lane) : vector(item, lane)))
            return begins || item.row != row || item.tile != tile;
        finish(item);
        return true;
    }

    // --- Transfers ---

    // Show the next address of a read, fetches first; false where there is none, or something may come before it.
    bool ask_to_read() {
        if (reads_.size() == kReadsInMemory) return false;
        constexpr Time kNever = INT64_MAX;
        const size_t loads = loads_.asked();
        const bool fetches_more = fetches_asked_ < std::min(fetches(), fetch_rooms_.size());
        const bool loads_more = loads_.any() && loads - loads_sent_ < kOutstandingBursts;
        const Time fetch = fetches_more ? std::max(fetch_rooms_[fetches_asked_], fetch_asked_ + 2) : kNever;
        const Time load = loads_more ? std::max(loads_.wanted(), load_ends_[loads % kOutstandingBursts]) : kNever;
        Time when = std::min(fetch, load), known = kNever - 1;
        if (!reads_.empty()) known = bus_.earliest_end(Bus::kRead, reads_.front());
        if (!writes_.empty()) known = std::min(known, bus_.earliest_end(Bus::kWrite, writes_.front()));
        if (when > known) return false;
        when = std::max({when, read_asked_ + 1, read_ends_[reads_asked_++ % kReadsInMemory]});
        read_asked_ = when;
        if (fetch <= load) fetches_asked_++, fetch_asked_ = when;
        reads_.push_back(fetch <= load ? Bus::Burst(when, when + latency_, uint64_t(kFetchBeats), true, true)
                                       : loads_.ask(when, latency_));
        return true;
    }

    // Let LOAD accept instructions as long as their times are known; whether it accepted any.
    bool accept_loads() {
        const size_t before = lane(Unit::kLoad).begun;
        do loads_.cut_on();
        while (loads_.all_cut() && accept_load());
        return lane(Unit::kLoad).begun > before;
    }

    bool accept_load() {
        Lane& lane = lanes_[int(Unit::kLoad)];
        const size_t begun = lane.begun;
        if (begun == lane.queue.size() || begun >= lane.next + kLoadsInFlight) return false;
        if (begun && !item(Unit::kLoad, begun - 1).idle) lane.free = loads_.cut() + 2;
        Item& item = items_[lane.queue[begun]];
        if ((item.idle && begun > lane.next) || !accept(Unit::kLoad)) return false;
        if (item.idle) return finish_idle(item), true;
        if (begun >= kLoadsInFlight)
            item.accepted = item.start = std::max(item.start, items_[lane.queue[begun - kLoadsInFlight]].end);
        std::vector<uint32_t> rows;
        if (item.gathered != SIZE_MAX) rows.assign(&gathered_[item.gathered], &gathered_[item.gathered] + item.rows);
        loads_.begin(item.start + item.prologue, item.address, item.stride, item.rows, item.beats, std::move(rows));
        return true;
    }

    // Let STORE accept instructions and announce bursts: kWaitingStores ahead of the data, and kOutstandingStores ahead of
    // the answers.
    bool announce_stores() {
        const size_t before = lane(Unit::kStore).begun;
        do {
            for (stores_.cut_on(); stores_.any() && writes_.size() < kWaitingStores; stores_.cut_on()) {
                const size_t n = stores_.asked();
                Time when = stores_.wanted();
                if (n >= kWaitingStores) when = std::max(when, store_ends_[(n - kWaitingStores) % kOutstandingStores]);
                if (n >= kOutstandingStores) when = std::max(when, store_ends_[n % kOutstandingStores] + latency_);
                writes_.push_back(stores_.ask(when, 1));
            }
        } while (stores_.all_cut() && accept_store());
        return lane(Unit::kStore).begun > before;
    }

    // The next one is accepted when the words of the one before are being read, and its bursts are all cut.
    bool accept_store() {
        Lane& lane = lanes_[int(Unit::kStore)];
        const size_t begun = lane.begun;
        if (begun == lane.queue.size() || begun > lane.next + 1) return false;
        if (begun && !item(Unit::kStore, begun - 1).idle)
            lane.free = std::max(reads_begin(begun - 1), stores_.cut()) + 2;
        Item& item = items_[lane.queue[begun]];
        if ((item.idle && begun > lane.next) || !accept(Unit::kStore)) return false;
        if (item.idle) {
            item.words_read = begun ? this->item(Unit::kStore, begun - 1).words_read : 0;
            return finish_idle(item), true;
        }
        if (begun >= kStoresInFlight)
            item.accepted = item.start = std::max(item.start, items_[lane.queue[begun - kStoresInFlight]].end + 1);
        stores_.begin(item.start, item.address, item.stride, item.rows, item.beats);
        return true;
    }

    // When the words of a STORE begin to be read: behind those of the one before.
    Time reads_begin(size_t number) {
        const Time before = number ? item(Unit::kStore, number - 1).words_read : 0;
        return std::max(item(Unit::kStore, number).start, before);
    }

    // Send bursts until an instruction has ended or arrived, or may be accepted; false where there is nothing to send.
    bool transfer() {
        while (true) {
            if (reads_.empty() && writes_.empty()) return false;
            Bus::Burst* const read = reads_.empty() ? nullptr : &reads_.front();
            if (bus_.carry(read, writes_.empty() ? nullptr : &writes_.front()) == Bus::kWrite) return stored(), true;
            read_ends_[reads_sent_++ % kReadsInMemory] = bus_.end(Bus::kRead);
            const Bus::Burst burst = *read;
            reads_.pop_front();
            if (burst.fetch) return fetched(burst), true;
            loaded(burst);
            if (burst.last) return true;
            do loads_.cut_on();
            while (ask_to_read());
            if (loads_.all_cut()) return true;
        }
    }

    void fetched(const Bus::Burst& burst) {
        record_.burst(kFetch, burst.asked, bus_.take_told(Bus::kRead));
        arrived_.push_back(bus_.end(Bus::kRead) + kFetchPipeline - kFetchTurn);
    }

    void loaded(const Bus::Burst& burst) {
        Lane& lane = lanes_[int(Unit::kLoad)];
        Item& item = items_[lane.queue[lane.next]];
        if (item.row++ == 0) {
            become_oldest(item);
            item.now = std::max(item.start, lane.ended);
            record_.begin_load(item.now);
        }
        record_.load(burst.asked, bus_.take_told(Bus::kRead));
        load_ends_[loads_sent_++ % kOutstandingBursts] = bus_.end(Bus::kRead);
        if (!burst.last) return;
        bus_.delay(Bus::kRead, Time(item.rows) * item.writes);
        item.end = bus_.end(Bus::kRead) + kLoadLatency;
        record_.end_load(item.end);
        const uint64_t useful = uint64_t(item.rows) * item.beats;
        const uint64_t span = item.end > item.now ? uint64_t(item.end - item.now) : 0;
        cycles(item).busy += std::min(useful, span);
        cycles(item).wait_data += span - std::min(useful, span);
        finish(item);
    }

    void stored() {
        Lane& lane = lanes_[int(Unit::kStore)];
        Item& item = items_[lane.queue[lane.next]];
        const Bus::Burst burst = writes_.front();
        writes_.pop_front();
        const Time sent = bus_.end(Bus::kWrite);
        record_.store(burst.asked, bus_.take_told(Bus::kWrite));
        store_ends_[stores_sent_++ % kOutstandingStores] = sent;
        if (!burst.last) return;
        become_oldest(item);
        const Time begin = std::max(item.start, lane.ended);
        item.words_read = std::max(reads_begin(lane.next) + Time(item.rows * item.words), sent - kBufferedBeats);
        item.end = sent + latency_;
        record_.store_ran({begin, item.end});
        const uint64_t useful = uint64_t(item.rows) * item.beats + 1;  // and the cycle in which it is done
        // Beats may have been sent while the one before was not yet answered, so this difference may be negative.
        cycles(item).busy += useful, cycles(item).wait_data += uint64_t(item.end - begin) - useful;
        finish(item);
    }

    static constexpr uint32_t whole_beats(uint32_t bytes) { return (bytes + isa::kBusBytes - 1) / isa::kBusBytes; }

    // --- Datapaths: false where an instruction stops in its middle ---

    // Beats of the VECTOR unit that take `columns` columns.
    static constexpr Time column_beats(Time columns) { return (columns + isa::kColumnsPerBeat - 1) / isa::kColumnsPerBeat; }

    bool matrix(Item& item, Lane& lane) {
        UnitCycles& cycles = this->cycles(item);
        const Time period = std::max<Time>(item.steps, isa::kRows);
        const bool skips = item.jump != ChunkSearch::kNone;
        if (skips && item.tile == 0) search_.begin(item.start);
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
            const Time own = skips ? search_.period(item.now, item.jump, item.steps % isa::kRows) : period;
            work_on(item, cycles, (item.tile ? 0 : item.prologue) + own);
            available_.push_back(item.now + kArrayLatency + 2 * isa::kRows - 2);
        }
        item.end = item.now;  // done pulses in the last cycle of the last tile
        lane.free = item.now;
        return true;
    }

    bool vector(Item& item, Lane& lane) {
        UnitCycles& cycles = this->cycles(item);
        for (; item.row < item.rows; item.row++) {
            const Time row_cycles = item.row ? item.shape.other_row : item.shape.first_row;
            if (!item.tiles) {
                work_on(item, cycles, row_cycles);
                continue;
            }
            const Time prologue = row_cycles - column_beats(item.columns) * item.shape.column;
            if (popped_.size() >= available_.size()) return false;
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

    void record_start(Time fetch) {
        record_.burst(kFetch, 1, {{1 + latency_, 1 + latency_ + fetch}});
        const Time begin = now_ - kOperandWords * fetch;
        if (operands_) record_.burst(kFetch, begin - latency_, {{begin, now_}});
    }

    Time latency_;
    Bus bus_;
    bool operands_;
    TimingRecorder record_;
    std::vector<Item> items_;
    size_t dispatched_ = 0, done_ = 0;
    Time now_ = 0;         // of the last dispatch
    uint32_t format_ = 0;  // of the weights of the last MATRIX instruction
    std::vector<uint32_t> gathered_;  // rows of device memory, of all LOADs that gather
    ChunkSearch search_;
    Lane lanes_[4];
    std::vector<Time> available_, popped_;  // result tiles: complete, discarded
    Requests loads_, stores_;
    std::deque<Bus::Burst> reads_, writes_;       // asked for and not sent
    std::vector<Time> fetch_rooms_, arrived_;     // fetches: when there is room, and at the buffer's output
    Time fetch_asked_ = -2, read_asked_ = -1;     // the last address
    size_t fetches_asked_ = 0, reads_asked_ = 0, reads_sent_ = 0, loads_sent_ = 0, stores_sent_ = 0;
    // Of the last bursts, by number.
    Time read_ends_[kReadsInMemory] = {}, load_ends_[kOutstandingBursts] = {}, store_ends_[kOutstandingStores] = {};
    Prediction result_;
};

}  // namespace lockstep
