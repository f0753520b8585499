"""Many copies of a module as one module of loops: what differs from copy to copy is an array, a step goes over it.

A simulator that is given each copy by itself works them out one after the other, bit by bit of control, in a page of
code for each. What is written here is compiled to vector instructions once for all of them. It is derived from the
flattened netlist of the module, cell by cell:

* What hangs on inputs that all copies share is worked out once, outside of the loops.
* Registers with the same enable are one loop behind one condition, together with the logic in front of them: an idle
  stage costs one branch.
* All words are 32 bits wide, whatever they hold, so that one instruction takes as many lanes of each. Wider registers
  and memories are several words; only sums and shifts of more bits are 64 bits wide.
* State is updated in place. Loops are ordered so that each is done before what it reads changes; where loops read each
  other's state, one leaves its result in an array of its own until the end.
* State that outputs are made of is assigned a second time, without blocking, to what the outputs are worked out from:
  so no order of blocks matters outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .expressions import Expressions, Word, inputs, split
from .netlist import Bit, Cell, Netlist

#: Of the ports of the written module: some are keywords without it.
PREFIX = "p_"
_UNROLL = "/* verilator unroll_disable */"
#: Around variables that waveforms leave out.
_UNSEEN, _SEEN = "/* verilator tracing_off */", "/* verilator tracing_on */"
_FOR = "for (i = 0; i < LANES; i = i + 1)"


@dataclass
class _Step:
    """State that changes under one condition. ``reads`` and ``writes`` are names of registers and memories."""

    enable: Bit
    registers: list[tuple[str, list[Bit]]] = field(default_factory=list)  # word, what it takes
    memory: tuple[str, list[Bit], list[list[Bit]]] | None = None  # memory, address, data by word
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    commits: int | None = None  # the number of the step whose result this one puts in place
    captured: bool = False


class Loops:
    """Writes the module ``name`` with a parameter LANES: so many copies of ``netlist``.

    shared : inputs that are the same for all copies. Every other port is that of copy 0, 1, ... side by side, from the
    lowest bit on. Raises ValueError where an enable or an address differs between copies that must not.
    """

    def __init__(self, netlist: Netlist, name: str, shared: Iterable[str]) -> None:
        self.netlist, self.name, self.shared_ports = netlist, name, set(shared)
        self.words: dict[Bit, tuple[Word, int]] = {}  # bit -> word and place in it
        self.cells: dict[str, Cell] = {}  # by the word that they give
        self.resets: dict[str, int | None] = {}
        self.initials: dict[str, int] = {}
        self.memory_words: dict[str, list[int]] = {}  # memory -> widths of its words
        self.loads: dict[str, list[Bit]] = {}
        self.locals: dict[str, str] = {}  # word -> variable, of the loop that is being written
        self._name_words()
        self._find_shared()
        self.inside = Expressions(self.words, self._text)
        self.outside = Expressions(self.words, self._text_outside)
        sources = [word for port in netlist.outputs.values() for word in self._cone(port)]
        self.shown = {word.name for word in sources if word.kind == "register" and word.name in self.differs}
        self.steps = _ordered(self._steps())
        for step in self.steps:
            if step.captured and step.memory is not None and _memory(step.memory[0]) not in self.differs:
                raise ValueError(f"memory '{step.memory[0]}', which all lanes share, is made of itself")

    def _text(self, word: Word) -> str:
        if word.kind == "shared":
            return _port(word.name)
        if word.kind == "register":
            return f"{word.name}[i]" if word.name in self.differs else word.name
        return self.locals[word.name]

    def _text_outside(self, word: Word) -> str:
        shown = word.kind == "register" and word.name in self.differs
        return self.locals[word.name] if shown else self._text(word)

    # What there is.

    def _name_words(self) -> None:
        netlist = self.netlist
        for port, bits in netlist.inputs.items():
            self._add(Word(port, len(bits), "shared" if port in self.shared_ports else "lane"), bits)
        used: set[str] = set()
        for register in netlist.registers:
            base = "".join(c if c.isalnum() else "_" for c in register.name.strip("\\"))
            while base in used:
                base += "_"
            used.add(base)
            for n, low in enumerate(range(0, len(register.outputs), 32)):
                bits = register.outputs[low : low + 32]
                word = Word(f"r_{base}_{n}" if len(register.outputs) > 32 else f"r_{base}", len(bits), "register")
                self._add(word, bits)
                self.loads[word.name] = register.data[low : low + 32]
                mask = (1 << len(bits)) - 1
                self.resets[word.name] = None if register.reset is None else register.reset >> low & mask
                self.initials[word.name] = register.initial >> low & mask
        for memory, at in netlist.memories.items():
            self.memory_words[memory] = [min(32, at.width - low) for low in range(0, at.width, 32)]
        for cell in netlist.cells:
            for part in split(cell):
                word = Word(f"t{len(self.cells)}", len(part.ports["Y"]), "cell")
                self.cells[word.name] = part
                self._add(word, part.ports["Y"])

    def _add(self, word: Word, bits: Sequence[Bit]) -> None:
        for place, bit in enumerate(bits):
            self.words.setdefault(bit, (word, place))

    def _find_shared(self) -> None:
        """The least set of words and memories that differ between copies."""
        self.differs: set[str] = set()
        readers: dict[str, set[str]] = {}

        def feed(target: str, bits: Iterable[Bit], memory: str = "") -> None:
            for word in {self.words[bit][0].name for bit in bits if isinstance(bit, int)}:
                readers.setdefault(word, set()).add(target)
            if memory:
                readers.setdefault(_memory(memory), set()).add(target)

        for name, cell in self.cells.items():
            feed(name, inputs(cell), cell.memory)
        for register in self.netlist.registers:
            for word in {self.words[bit][0].name for bit in register.outputs}:
                feed(word, [*register.data, register.enable])
        for write in self.netlist.writes:
            feed(_memory(write.memory), [*write.address, *write.data, write.enable])
        pending = [port for port in self.netlist.inputs if port not in self.shared_ports]
        while pending:
            name = pending.pop()
            if name not in self.differs:
                self.differs.add(name)
                pending += readers.get(name, ())

    def _cone(self, bits: Iterable[Bit]) -> list[Word]:
        """The words that ``bits`` are made of, each behind those that it is made of."""
        order: list[Word] = []
        seen: set[str] = set()
        stack = [(self.words[bit][0], False) for bit in bits if isinstance(bit, int)]
        stack.reverse()
        while stack:
            word, done = stack.pop()
            if done:
                order.append(word)
            elif word.name not in seen:
                seen.add(word.name)
                stack.append((word, True))
                if word.kind == "cell":
                    inner = inputs(self.cells[word.name])
                    stack += [(self.words[bit][0], False) for bit in inner if isinstance(bit, int)]
        return order

    def _state(self, bits: Iterable[Bit]) -> set[str]:
        found = set()
        for word in self._cone(bits):
            if word.kind == "register":
                found.add(word.name)
            elif word.kind == "cell" and self.cells[word.name].memory:
                found.add(_memory(self.cells[word.name].memory))
        return found

    def _steps(self) -> list[_Step]:
        by_enable: dict[tuple[Bit, bool], _Step] = {}
        steps: list[_Step] = []
        for register in self.netlist.registers:
            if self._differs(register.enable):
                raise ValueError(f"register '{register.name}' has an enable of its own in each lane")
            key = (register.enable, self._differs(*register.outputs))
            if key not in by_enable:
                by_enable[key] = _Step(register.enable)
                steps.append(by_enable[key])
            step = by_enable[key]
            for name in dict.fromkeys(self.words[bit][0].name for bit in register.outputs):
                step.registers.append((name, self.loads[name]))
                if name in self.differs:
                    step.writes.add(name)
            step.reads |= self._state(register.data)
        for write in self.netlist.writes:
            if self._differs(write.enable, *write.address):
                raise ValueError(f"memory '{write.memory}' is written at an address of its own in each lane")
            data = [write.data[low : low + 32] for low in range(0, len(write.data), 32)]
            step = _Step(write.enable, memory=(write.memory, write.address, data), writes={_memory(write.memory)})
            step.reads = self._state([*write.data, *write.address])
            steps.append(step)
        return steps

    def _differs(self, *bits: Bit) -> bool:
        return any(self.words[bit][0].name in self.differs for bit in bits if isinstance(bit, int))

    # What is written.

    def verilog(self) -> str:
        """The text of the module."""
        lines = [f"module {self.name} #(parameter LANES = 1) ("]
        ports = [self._port("input", port, bits) for port, bits in self.netlist.inputs.items()]
        ports += [self._port("output", port, bits) for port, bits in self.netlist.outputs.items()]
        lines += [",\n".join(f"    {port}" for port in ports), ");"]
        lines += self._declarations()
        lines += self._initial()
        lines += self._clocked()
        for port, bits in self.netlist.outputs.items():
            lines += self._output(port, bits)
        lines.append("endmodule\n")
        return "\n".join(lines)

    def _port(self, direction: str, port: str, bits: Sequence[Bit]) -> str:
        copies = "" if port in self.shared_ports and direction == "input" else "*LANES"
        return f"{direction} {'logic ' if direction == 'output' else 'wire '}[{len(bits)}{copies}-1:0] {_port(port)}"

    def _declarations(self) -> list[str]:
        lines = []
        for name in self.initials:
            lines.append(f"  reg [31:0] {name}{' [0:LANES-1]' if name in self.differs else ''};")
            if name in self.shown:
                lines.append(f"  reg [32*LANES-1:0] {name}_shown, {name}_next;")
        for memory, widths in self.memory_words.items():
            depth = self.netlist.memories[memory].depth
            lanes = "[0:LANES-1]" if _memory(memory) in self.differs else ""
            lines += [f"  reg [31:0] {_memory(memory)}_{n} [0:{depth - 1}]{lanes};" for n in range(len(widths))]
        for step in self.steps:
            if step.captured:
                lines += [f"  reg [31:0] {name} [0:LANES-1];" for name in self._captures(step)]
        return lines

    def _initial(self) -> list[str]:
        lines = ["  initial begin : initially", "    reg [31:0] i, w;", "    i = 0;", "    w = 0;"]
        values = {name: _number(value) for name, value in self.initials.items()}
        lines += _loop("    ", [f"{name}[i] = {value};" for name, value in values.items() if name in self.differs])
        lines += [f"    {name} = {value};" for name, value in values.items() if name not in self.differs]
        for name in self._shown():
            lines.append(f"    {name}_shown = {{LANES{{{values[name]}}}}};")
        for memory, widths in self.memory_words.items():
            lines.append(f"    {_UNROLL} for (w = 0; w < {self.netlist.memories[memory].depth}; w = w + 1) begin")
            words = [f"{_memory(memory)}_{n}[w]" for n in range(len(widths))]
            if _memory(memory) in self.differs:
                lines += _loop("      ", [f"{word}[i] = 32'd0;" for word in words])
            else:
                lines += [f"      {word} = 32'd0;" for word in words]
            lines.append("    end")
        lines.append("  end")
        return lines

    def _shown(self) -> list[str]:
        return [name for name in self.initials if name in self.shown]

    def _captures(self, step: _Step) -> list[str]:
        if step.memory is not None:
            return [f"{_memory(step.memory[0])}_{n}_later" for n in range(len(step.memory[2]))]
        return [f"{name}_later" for name, _ in step.registers]

    def _clocked(self) -> list[str]:
        # Conditions and addresses are those of before the edge, whatever the order of the steps.
        controls: list[Bit] = []
        for step in self.steps:
            controls.append(step.enable)
            if step.memory is not None:
                controls += step.memory[1]
        known = [word for word in self._cone(controls) if word.kind == "cell"]
        self.locals = {word.name: word.name for word in known}
        own = [f"  reg [{word.bits - 1}:0] {word.name};" for word in known]
        lines = [f"  {_UNSEEN}", *own, "  reg [31:0] i;", f"  {_SEEN}"]
        for n, step in enumerate(self.steps):
            self.locals = {word.name: word.name for word in known}
            lines += self._step(n, step)
        self.locals = {word.name: word.name for word in known}
        lines.append(f"  always @(posedge {_port('clk')}) begin")
        lines += [f"    {word.name} = {self._value(word, self.inside)};" for word in known]
        for n, step in enumerate(self.steps):
            lines.append(f"    if ({self.inside.bits([step.enable])} != 32'd0) step{n};")
        lines.append(f"    if ({_port('rst')}) begin")
        cleared = [(name, value) for name, value in self.resets.items() if value is not None]
        lines += _loop("      ", [f"{name}[i] = {_number(v)};" for name, v in cleared if name in self.differs])
        lines += [f"      {name} <= {_number(v)};" for name, v in cleared if name not in self.differs]
        lines += [f"      {name}_shown <= {{LANES{{{_number(v)}}}}};" for name, v in cleared if name in self.shown]
        return [*lines, "    end", "  end"]

    def _local(self, key: str, bits: int) -> str:
        """The variable of the loop at hand that holds the word ``key``; loops share their variables."""
        kind = "v" if bits == 32 else "q"
        if key not in self.locals:
            self.locals[key] = f"{kind}{sum(name.startswith(kind) for name in self.locals.values())}"
        return self.locals[key]

    def _step(self, number: int, step: _Step) -> list[str]:
        """A task: variables of tasks are never state of the module."""
        known = set(self.locals)
        differs = bool({_memory(step.memory[0])} & self.differs if step.memory else step.writes or step.captured)
        lines: list[str] = []
        if step.commits is not None:
            source = self.steps[step.commits]
            pairs = zip(self._targets(source), self._captures(source), strict=True)
            lines += _loop("      ", [f"{target} = {name}[i];" for target, name in pairs])
        else:
            data = [bits for _, bits in step.registers] if step.memory is None else step.memory[2]
            cone = [word for word in self._cone([bit for bits in data for bit in bits]) if word.name not in known]
            once, body = self._variables(cone, self.inside)
            values = []
            for k, bits in enumerate(data):
                value = self.inside.bits(bits)
                values.append(self._local(f"next {k}", 32))
                body.append(f"{values[-1]} = {value};")
            lines += [f"      {line}" for line in once]
            if differs:
                shown = [name for name, _ in step.registers if name in self.shown]
                targets = [f"{name}[i]" for name in self._captures(step)] if step.captured else self._targets(step)
                body += [f"{target} = {value};" for target, value in zip(targets, values, strict=True)]
                for (name, _), value in zip(step.registers, values, strict=False):
                    if name in self.shown:
                        body.append(f"{name}_next[32*i +: 32] = {value};")
                lines += [*_loop("      ", body), *(f"      {name}_shown <= {name}_next;" for name in shown)]
            else:
                assign = "<=" if step.memory is None else "="
                lines += [f"      {line}" for line in body]
                for target, value in zip(self._targets(step), values, strict=True):
                    lines.append(f"      {target} {assign} {value};")
        names = sorted({name for key, name in self.locals.items() if key not in known})
        own = [f"    reg [{63 if name.startswith('q') else 31}:0] {name};" for name in ("i", *names)]
        return [f"  task automatic step{number};", *own, "    begin", *lines, "    end", "  endtask"]

    def _targets(self, step: _Step) -> list[str]:
        """What the step assigns to."""
        if step.memory is None:
            return [f"{name}[i]" if name in self.differs else name for name, _ in step.registers]
        memory, address, data = step.memory
        lane = "[i]" if _memory(memory) in self.differs else ""
        return [f"{_memory(memory)}_{n}[{self.inside.bits(address)}]{lane}" for n in range(len(data))]

    def _variables(self, cone: Iterable[Word], where: Expressions) -> tuple[list[str], list[str]]:
        """Assignments to variables for the inputs and cells of a loop: those in front of it, and those inside."""
        once: list[str] = []
        body: list[str] = []
        for word in cone:
            if word.kind == "lane":
                part = f"{_port(word.name)}[{word.width}*i +: {word.width}]"
                value = f"{{{word.bits - word.width}'d0, {part}}}" if word.bits > word.width else part
                body.append(f"{self._local(word.name, word.bits)} = {value};")
            elif word.kind == "cell":
                value = self._value(word, where)
                (body if word.name in self.differs else once).append(f"{self._local(word.name, word.bits)} = {value};")
            elif where is self.outside and word.kind == "register" and word.name in self.differs:
                body.append(f"{self._local(word.name, 32)} = {word.name}_shown[32*i +: 32];")
        return once, body

    def _value(self, word: Word, where: Expressions) -> str:
        cell = self.cells[word.name]
        if cell.kind == "$memrd":
            if where is self.outside:
                raise ValueError(f"an output reads the memory '{cell.memory}'")
            memory = _memory(cell.memory)
            lane = "[i]" if memory in self.differs else ""
            return f"{memory}_{cell.parameters['WORD']}[{where.bits(cell.ports['ADDR'])}]{lane}"
        return where.cell(cell)

    def _output(self, port: str, bits: list[Bit]) -> list[str]:
        width, first = len(bits), self.words[bits[0]][0]
        whole = width == 32 and all(self.words[bit] == (first, place) for place, bit in enumerate(bits))
        if whole and first.kind == "register" and first.name in self.differs:
            return [f"  assign {_port(port)} = {first.name}_shown;"]
        self.locals = {}
        guards, rest = self._guards(bits)
        once, body = self._variables(self._cone([*guards, *rest]), self.outside)
        for low in range(0, width, 32):
            part = bits[low : low + 32]
            value = " & ".join(self.outside.bits([bit]) for bit in rest) if guards else self.outside.bits(part)
            result = self._local(f"part {low}", 32)
            place = f"{width}*i + {low} +: {len(part)}" if low else f"{width}*i +: {len(part)}"
            body += [f"{result} = {value};", f"{_port(port)}[{place}] = {result}[{len(part) - 1}:0];"]
        lines = [f"  always_comb begin : {port}_"]
        names = sorted(set(self.locals.values()))
        own = [f"    reg [{63 if name.startswith('q') else 31}:0] {name};" for name in ("i", *names)]
        lines += [f"    {_UNSEEN}", *own, f"    {_SEEN}"]
        lines += [f"    {name} = 0;" for name in ("i", *names)]
        lines += [f"    {line}" for line in once]
        if guards:
            condition = " & ".join(self.outside.bits([bit]) for bit in guards)
            lines += [f"    {_port(port)} = '0;", f"    if (({condition}) != 32'd0) begin", *_loop("      ", body)]
            lines.append("    end")
        else:
            lines += _loop("    ", body)
        return [*lines, "  end"]

    def _guards(self, bits: list[Bit]) -> tuple[list[Bit], list[Bit]]:
        """Of an output of one bit: what all lanes share and is 1 wherever the output is, and what else it needs."""
        guards: list[Bit] = []
        found: list[Bit] = []
        pending = list(bits)
        if len(bits) != 1:
            return guards, bits
        while pending:
            bit = pending.pop()
            word = self.words[bit][0] if isinstance(bit, int) else None
            if word and word.kind == "cell" and self.cells[word.name].kind == "$and" and word.width == 1:
                pending += [self.cells[word.name].ports["A"][0], self.cells[word.name].ports["B"][0]]
            else:
                (found if self._differs(bit) else guards).append(bit)
        return (guards, found) if guards and found else ([], bits)


def _port(name: str) -> str:
    return f"{PREFIX}{name}"


def _memory(name: str) -> str:
    return "m_" + "".join(c if c.isalnum() else "_" for c in name)


def _number(value: int) -> str:
    return f"32'h{value:x}"


def _loop(indent: str, body: list[str]) -> list[str]:
    if not body:
        return []
    return [f"{indent}{_UNROLL}", f"{indent}{_FOR} begin", *(f"{indent}  {line}" for line in body), f"{indent}end"]


def _ordered(steps: list[_Step]) -> list[_Step]:
    """The steps, each before those that change what it reads."""
    steps = list(steps)
    while True:
        after = [
            {m for m, other in enumerate(steps) if m != n and (step.reads & other.writes or other.commits == n)}
            for n, step in enumerate(steps)
        ]
        order: list[int] = []
        placed: set[int] = set()
        waits_for = [{n for n, later in enumerate(after) if m in later} for m in range(len(steps))]
        while ready := [n for n in range(len(steps)) if n not in placed and waits_for[n] <= placed]:
            order += ready
            placed |= set(ready)
        if len(order) == len(steps):
            place = {n: at for at, n in enumerate(order)}
            for step in steps:
                if step.commits is not None:
                    step.commits = place[step.commits]
            return [steps[n] for n in order]
        reach = _reachable(after)
        circular = [n for n in range(len(steps)) if n in reach[n]]
        n = min(circular, key=lambda n: (len(steps[n].writes), n))
        commit = _Step(steps[n].enable, writes=steps[n].writes, commits=n)
        steps[n].writes, steps[n].captured = set(), True
        steps.append(commit)


def _reachable(after: list[set[int]]) -> list[set[int]]:
    found = []
    for start in range(len(after)):
        seen: set[int] = set()
        pending = list(after[start])
        while pending:
            if (n := pending.pop()) not in seen:
                seen.add(n)
                pending += after[n]
        found.append(seen)
    return found
