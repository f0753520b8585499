// The fast core behind a C interface: programs from device memory, their result and their predicted time.
#include "fast_core.hpp"

#include "lockstep/flush_to_zero.hpp"
#include "timing.hpp"

using namespace lockstep;

namespace {

struct Outcome {
    uint32_t code, instruction, address, unit, flags;
    uint32_t unused;
    Prediction prediction;
};

constexpr uint32_t kControlUnit = 4;

}  // namespace

extern "C" {

void* lockstep_fast_create(uint64_t bytes) { return new FastCore(bytes); }

void lockstep_fast_destroy(void* core) { delete static_cast<FastCore*>(core); }

uint8_t* lockstep_fast_memory(void* core) { return static_cast<FastCore*>(core)->memory.data(); }

// Forget what was recorded, and record from now on or not.
void lockstep_fast_record(void* core, int on) { static_cast<FastCore*>(core)->recording = {on != 0, {}}; }

const Event* lockstep_fast_events(void* core, uint64_t* count) {
    const auto& events = static_cast<FastCore*>(core)->recording.events;
    *count = events.size();
    return events.data();
}

// Execute `count` instructions at `address`. `shapes` has one row per instruction (used for VECTOR only), for the values
// that fields have with the operands; `operands` has kOperands words, the first zero, or is null where there are none.
void lockstep_fast_execute(void* handle, uint32_t address, uint32_t count, const VectorShape* shapes,
                           const uint32_t* operands, uint64_t window_base, uint64_t window_limit, BusTiming bus,
                           Outcome* outcome) {
    FastCore& core = *static_cast<FastCore*>(handle);
    const FlushToZero mode;
    core.window_base = window_base;
    core.window_limit = window_limit;
    core.flags = 0;
    core.reset();
    TimingModel timing(bus, operands != nullptr, core.recording.on ? &core.recording : nullptr);
    const uint32_t zeros[isa::kOperands] = {};
    if (!operands) operands = zeros;
    *outcome = Outcome{};
    Failure failure;
    uint32_t n = 0;
    auto refuse = [](ErrorCode code, uint32_t at) {
        Failure f{code, at, isa::Unit::kLoad, true};
        return f;
    };
    for (; n < count && !failure; n++) {
        const uint64_t at = uint64_t(address) + uint64_t(n) * isa::kInstructionBytes;
        if (address % std::max(isa::kInstructionBytes, isa::kBusBytes)) failure = refuse(ErrorCode::kMisaligned, uint32_t(at));
        else if (at < window_base || at + isa::kInstructionBytes > window_limit)
            failure = refuse(ErrorCode::kOutOfWindow, uint32_t(at));
        if (failure) break;
        const isa::Word word(core.memory.data() + at);
        const Failure malformed = refuse(ErrorCode::kBadField, uint32_t(at));
        switch (word.bits(0, 4)) {
            case isa::Load::kOpcode: {
                isa::Load i(word);
                if (!i.well_formed(word)) failure = malformed;
                else if (!i.resolve(operands)) timing.add_nothing(i);
                else failure = core.load(i), timing.add_load(i, core.index);
                break;
            }
            case isa::Matrix::kOpcode: {
                isa::Matrix i(word);
                if (!i.well_formed(word)) failure = malformed;
                else if (!i.resolve(operands)) timing.add_nothing(i);
                else failure = core.matrix(i), timing.add_matrix(i, core.jumps);
                break;
            }
            case isa::Vector::kOpcode: {
                isa::Vector i(word);
                if (!i.well_formed(word)) {
                    failure = malformed;
                } else if (!i.resolve(operands)) {
                    timing.add_nothing(i);
                } else {
                    const bool starved = i.source == Source::kAccumulator &&
                                         !core.has_tiles(i.tiles * ((i.columns + kRows - 1) / kRows));
                    failure = starved ? Failure{ErrorCode::kWatchdog, 0, isa::Unit::kVector, false} : core.vector(i);
                    timing.add_vector(i, shapes[n]);
                }
                break;
            }
            case isa::Store::kOpcode: {
                isa::Store i(word);
                if (!i.well_formed(word)) failure = malformed;
                else if (!i.resolve(operands)) timing.add_nothing(i);
                else failure = core.store(i), timing.add_store(i);
                break;
            }
            default: failure = refuse(ErrorCode::kBadOpcode, uint32_t(at));
        }
        if (failure) break;
    }
    outcome->flags = core.flags;
    if (!failure && !timing.solve()) {
        failure = {ErrorCode::kWatchdog, 0, timing.stuck_unit(), false};
        n = timing.stuck_instruction();
    }
    outcome->prediction = timing.prediction();
    if (failure) {
        outcome->code = uint32_t(failure.code);
        outcome->instruction = n;
        outcome->address = failure.address;
        outcome->unit = failure.control ? kControlUnit : uint32_t(failure.unit);
    }
}
}
