"""The core: control, four units, four scratchpads. See the page on the machine for the picture."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import BY_NAME, INDEX_ENTRIES, Memory, Unit
from lockstep_isa.registers import ADDRESS_BITS, Status, core_counters

from .axi import Lite, ReadArbiter, ReadMaster, WriteMaster
from .control.queue import INDEX_BITS, UnitQueue
from .control.registers import RegisterFile
from .control.sequencer import Sequencer
from .control.supervisor import Supervisor
from .control.tokens import Tokens
from .index_memory import IndexMemory
from .matrix.unit import MatrixUnit
from .scratchpad import Scratchpad, port_words
from .transfer.load import LoadUnit
from .transfer.store import StoreUnit
from .vector.unit import VectorUnit
from .zero_words import ZeroWords


class Core(wiring.Component):
    """One Lockstep core.

    Ports
    -----
    registers : In(Lite), the register map of ``lockstep_isa.registers``.
    memory_read : Out(ReadMaster with one ID bit), memory_write : Out(WriteMaster): device memory.
    irq : Out(1), interrupt, high while there is nothing to do: every descriptor is complete, or an error stopped the
        core.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        super().__init__(
            {
                "registers": In(Lite(ADDRESS_BITS)),
                "irq": Out(1),
                "memory_read": Out(ReadMaster(config.bus_bytes, id_bits=1)),
                "memory_write": Out(WriteMaster(config.bus_bytes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.registers = registers = RegisterFile(self.config)
        m.submodules.supervisor = supervisor = Supervisor(core_counters(self.config))
        machine = Machine(self.config)
        m.submodules.machine = ResetInserter(supervisor.soft_reset)(machine)
        wiring.connect(m, registers.bus, wiring.flipped(self.registers))
        wiring.connect(m, machine.memory_read, wiring.flipped(self.memory_read))
        wiring.connect(m, machine.memory_write, wiring.flipped(self.memory_write))

        for name in ("WINDOW_BASE", "WINDOW_LIMIT", "RING_BASE", "RING_SIZE", "RING_TAIL"):
            m.d.comb += getattr(machine, name.lower()).eq(getattr(registers, name))
        flags = Signal(2)
        with m.If(registers.written_FLAGS):
            m.d.sync += flags.eq(flags & ~registers.write_data)
        with m.Else():
            m.d.sync += flags.eq(flags | machine.flags)
        m.d.comb += self.irq.eq(~machine.busy | supervisor.error_code.any())
        m.d.comb += [
            supervisor.watchdog.eq(registers.WATCHDOG),
            supervisor.reset_request.eq(registers.written_CONTROL & registers.write_data[0]),
            supervisor.clear_counters.eq(registers.written_CONTROL & registers.write_data[1]),
            machine.halt.eq(supervisor.halt),
            registers.value_STATUS.eq(
                Mux(machine.busy, Status.BUSY, 0) | Mux(supervisor.error_code.any(), Status.ERROR, 0)
            ),
            registers.value_FLAGS.eq(flags),
            registers.value_ERROR_CODE.eq(supervisor.error_code),
            registers.value_ERROR_INSTRUCTION.eq(supervisor.error_index),
            registers.value_ERROR_ADDRESS.eq(supervisor.error_address),
            registers.value_ERROR_UNIT.eq(supervisor.error_unit),
            registers.value_RING_HEAD.eq(machine.ring_head),
            registers.value_FENCE.eq(machine.fence),
        ]
        for name in supervisor.counters:
            m.d.comb += getattr(registers, f"value_COUNT_{name}").eq(getattr(supervisor, f"count_{name}"))
        for name, member in machine.signature.members.items():
            value = getattr(machine, name)
            if name.startswith(("running_", "stalled_", "waiting_")):
                # Counters may be a cycle late: they are far from the units.
                state = Signal.like(value, name=f"state_{name}")
                m.d.sync += state.eq(value)
                m.d.comb += getattr(supervisor, name).eq(state)
            elif name.startswith(("error_", "code_", "address_", "index_")):
                assert member.flow == Out
                # A report crosses the chip in a cycle of its own; one of the cycle of a reset is void.
                report = Signal.like(value, name=f"report_{name}")
                m.d.sync += report.eq(Mux(supervisor.soft_reset, 0, value))
                m.d.comb += getattr(supervisor, name).eq(report)
        m.d.comb += [
            supervisor.busy.eq(machine.busy),
            supervisor.progress.eq(machine.progress),
            supervisor.bus_quiet.eq(machine.bus_quiet),
            supervisor.events.eq(machine.events),
        ]
        return m


class Machine(wiring.Component):
    """What a soft reset resets: sequencer, queues, units and scratchpads.

    Its ports are those of :class:`Core` without the registers, and what :class:`Supervisor` and the register file
    exchange with it.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        reports = {}
        for n in (*(u.name.lower() for u in Unit), "control"):
            reports |= {
                f"error_{n}": Out(1),
                f"code_{n}": Out(4),
                f"address_{n}": Out(32),
                f"index_{n}": Out(INDEX_BITS),
            }
        states = {f"{s}_{u.name.lower()}": Out(1) for u in Unit for s in ("running", "stalled", "waiting")}
        super().__init__(
            {
                "memory_read": Out(ReadMaster(config.bus_bytes, id_bits=1)),
                "memory_write": Out(WriteMaster(config.bus_bytes)),
                "window_base": In(32),
                "window_limit": In(32),
                "ring_base": In(32),
                "ring_size": In(32),
                "ring_tail": In(32),
                "ring_head": Out(32),
                "fence": Out(32),
                "halt": In(1),
                "busy": Out(1),
                "progress": Out(1),
                "bus_quiet": Out(1),
                "flags": Out(2),
                "events": Out(len(core_counters(config)) - 1),
            }
            | reports
            | states
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        c = self.config
        operand, vector = 8 * c.rows, 32 * c.rows

        def scratchpad(memory: Memory, width: int, depth: int) -> Scratchpad:
            watched = memory == Memory.ACTIVATION and c.zero_skipping
            return Scratchpad(width, c.rows, depth, port_words(c, memory), watched)

        m.submodules.sequencer = sequencer = Sequencer(c)
        m.submodules.tokens = tokens = Tokens()
        m.submodules.load = load = LoadUnit(c)
        m.submodules.matrix = matrix = MatrixUnit(c)
        m.submodules.vector = vector_unit = VectorUnit(c)
        m.submodules.store = store = StoreUnit(c)
        m.submodules.arbiter = arbiter = ReadArbiter(c)
        m.submodules.activation = activation = scratchpad(Memory.ACTIVATION, operand, c.activation_words)
        m.submodules.weight = weight = scratchpad(Memory.WEIGHT, operand, c.weight_words)
        m.submodules.vectors = vectors = scratchpad(Memory.VECTOR, vector, c.vector_words)
        m.submodules.parameter = parameter = scratchpad(Memory.PARAMETER, vector, c.parameter_words)

        # Memories.
        wiring.connect(m, load.fill_activation, activation.fill)
        wiring.connect(m, load.fill_weight, weight.fill)
        wiring.connect(m, load.fill_vector, vectors.fill)
        wiring.connect(m, load.fill_parameter, parameter.fill)
        for name, memory in (
            ("activation", activation),
            ("weight", weight),
            ("vector", vectors),
            ("parameter", parameter),
        ):
            wiring.connect(m, getattr(vector_unit, f"{name}_write"), memory.write)
            m.d.comb += memory.write_idle.eq(getattr(vector_unit, f"{name}_write_idle"))
        wiring.connect(m, matrix.activation_read, activation.read)
        wiring.connect(m, matrix.weight_read, weight.read)
        wiring.connect(m, vector_unit.vector_read, vectors.read)
        wiring.connect(m, vector_unit.parameter_read, parameter.read)
        wiring.connect(m, store.read, vectors.drain)
        wiring.connect(m, vector_unit.accumulator, matrix.accumulator)
        m.d.comb += [
            store.read_ready.eq(vectors.drain_ready),
            vector_unit.table_write.enable.eq(load.table_enable),
            vector_unit.table_write.address.eq(load.table_address),
            vector_unit.table_write.data.eq(load.table_data),
            self.flags.eq(vector_unit.flags),
        ]
        if c.zero_skipping:
            m.submodules.zero_words = zero_words = ZeroWords(c, activation.written_words)
            wiring.connect(m, activation.written, zero_words.write)
            wiring.connect(m, matrix.zero_read, zero_words.read)
        if c.selection:
            m.submodules.index = index = IndexMemory()
            wiring.connect(m, vector_unit.index_write, index.write)
            wiring.connect(m, load.index, index.read)

        # Bus.
        wiring.connect(m, load.bus, arbiter.load)
        wiring.connect(m, sequencer.bus, arbiter.fetch)
        wiring.connect(m, arbiter.bus, wiring.flipped(self.memory_read))
        wiring.connect(m, store.bus, wiring.flipped(self.memory_write))
        for unit in (load, store, sequencer):
            m.d.comb += [
                unit.window.base.eq(self.window_base),
                unit.window.limit.eq(self.window_limit),
                unit.halt.eq(self.halt),
            ]
        m.d.comb += self.bus_quiet.eq(~(load.outstanding | store.outstanding | sequencer.outstanding))

        # Queues and tokens.
        units = {Unit.LOAD: load, Unit.MATRIX: matrix, Unit.VECTOR: vector_unit, Unit.STORE: store}
        queues = {}
        for unit, component in units.items():
            name = unit.name.lower()
            m.submodules[f"queue_{name}"] = queue = UnitQueue(c, BY_NAME[unit.name])
            queues[unit] = queue
            wiring.connect(m, getattr(sequencer, f"push_{name}"), queue.push)
            wiring.connect(m, queue.instruction, component.instruction)
            m.d.comb += [
                queue.done.eq(component.done),
                queue.halt.eq(self.halt),
                queue.granted.eq(getattr(tokens, f"granted_{name}")),
                getattr(tokens, f"want_{name}").eq(queue.want),
                getattr(tokens, f"take_{name}").eq(queue.take),
                getattr(tokens, f"give_{name}").eq(queue.give),
                getattr(self, f"running_{name}").eq(queue.running),
                getattr(self, f"stalled_{name}").eq(component.stalled),
                getattr(self, f"waiting_{name}").eq(queue.waiting),
            ]

        # Control.
        for name in ("ring_base", "ring_size", "ring_tail"):
            m.d.comb += getattr(sequencer, name).eq(getattr(self, name))
        read, write = self.memory_read.r, self.memory_write.w
        of_features = [matrix.skipped] if c.zero_skipping else []
        at_work = [q.running & ~units[u].stalled for u, q in queues.items()]
        m.d.comb += [
            self.ring_head.eq(sequencer.ring_head),
            self.fence.eq(sequencer.fence),
            self.busy.eq(sequencer.busy),
            sequencer.units_idle.eq(Cat(q.empty for q in queues.values()).all()),
            self.progress.eq(
                Cat(read.valid & read.ready, write.valid & write.ready, sequencer.dispatched, *at_work).any()
            ),
            self.events.eq(
                Cat(
                    *(sequencer.dispatched, read.valid & read.ready, write.valid & write.ready, matrix.streaming),
                    *of_features,
                )
            ),
        ]

        # Errors: what a unit reports itself, then what the memories say of it, which is of the cycle before.
        accessing = {}
        for unit, queue in queues.items():
            accessing[unit] = index = Signal(INDEX_BITS, name=f"accessing_{unit.name.lower()}")
            # LOAD writes for its oldest instruction; STORE reads ahead, for the newest or the one before.
            of_unit = {Unit.LOAD: queue.oldest, Unit.STORE: Mux(store.read_earlier, queue.earlier, queue.newest)}
            m.d.sync += index.eq(of_unit.get(unit, queue.newest))
        for unit, error in ((Unit.LOAD, load.error), (Unit.STORE, store.error)):
            name = unit.name.lower()
            queue = queues[unit]
            m.d.comb += [
                getattr(self, f"error_{name}").eq(error.valid),
                getattr(self, f"code_{name}").eq(error.code),
                getattr(self, f"address_{name}").eq(error.address),
                getattr(self, f"index_{name}").eq(Mux(error.oldest, queue.oldest, queue.newest)),
            ]
        m.d.comb += [
            self.error_control.eq(sequencer.error.valid),
            self.code_control.eq(sequencer.error.code),
            self.address_control.eq(sequencer.error.address),
            self.index_control.eq(sequencer.index),
        ]
        for memory, writer, reader in (
            (activation, Unit.VECTOR, Unit.MATRIX),
            (weight, Unit.VECTOR, Unit.MATRIX),
            (vectors, Unit.VECTOR, Unit.VECTOR),
            (parameter, Unit.VECTOR, Unit.VECTOR),
        ):
            for event, unit in (
                (memory.bounds_write, writer),
                (memory.bounds_read, reader),
                (memory.bounds_fill, Unit.LOAD),
                *([(memory.bounds_drain, Unit.STORE)] if memory.drains else []),
            ):
                name = unit.name.lower()
                with m.If(event):
                    m.d.comb += [
                        getattr(self, f"error_{name}").eq(1),
                        getattr(self, f"code_{name}").eq(ErrorCode.LOCAL_BOUNDS),
                        getattr(self, f"address_{name}").eq(memory.bounds_address),
                    ]
                    m.d.comb += getattr(self, f"index_{name}").eq(accessing[unit])
        if c.selection:
            with m.If(vector_unit.select_beyond):
                m.d.comb += [
                    *(self.error_vector.eq(1), self.code_vector.eq(ErrorCode.LOCAL_BOUNDS)),
                    *(self.address_vector.eq(INDEX_ENTRIES), self.index_vector.eq(accessing[Unit.VECTOR])),
                ]
        return m
