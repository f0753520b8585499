"""Delay lines of the feed-forward pipeline, kept in memories instead of registers."""

from amaranth.hdl import Module, Shape, Signal, ValueLike
from amaranth.lib.memory import Memory

#: Delays from which on a memory is deeper than 32 words.
BLOCK_RAM_DELAY = 32


def delayed(
    m: Module,
    name: str,
    value: ValueLike,
    start: int,
    end: int,
    valid: ValueLike,
    time: ValueLike,
    enable: ValueLike = 1,
) -> ValueLike:
    """``value`` of stage ``start`` as stage ``end`` sees it.

    ``valid`` has one bit per stage (a beat is in it), ``time`` counts cycles and has at least log2(end - start) bits.
    A beat writes at the address of its time and is read that much later. ``enable`` is constant during a pass;
    without it nothing is written. Uses one simple dual-port memory of the next power of two. A memory so deep that
    synthesis takes a block RAM for it is read a cycle earlier, into a register: block RAM answers late in a cycle.
    """
    wait = end - 1 - start
    assert wait >= 1, f"{name}: a delay of {end - start} is a register"
    registered = wait >= BLOCK_RAM_DELAY
    read_stage = end - 2 if registered else end - 1
    bits = wait.bit_length()
    assert bits <= len(time)
    m.submodules[name] = memory = Memory(shape=Shape(len(value)), depth=1 << bits, init=[])
    write, read = memory.write_port(), memory.read_port()
    address = Signal(bits, name=f"{name}_address")
    m.d.comb += [
        write.en.eq(valid[start] & enable),
        write.addr.eq(time[:bits]),
        write.data.eq(value),
        address.eq(time[:bits] - (read_stage - start)),
        read.addr.eq(address),
        read.en.eq(valid[read_stage] & enable),
    ]
    if not registered:
        return read.data
    result = Signal(len(value), name=f"{name}_result")
    with m.If(valid[end - 1] & enable):
        m.d.sync += result.eq(read.data)
    return result
