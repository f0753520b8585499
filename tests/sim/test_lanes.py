"""Lanes as loops against the same lanes one by one: random stimulus, every output in every cycle."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from cores import SHAPES
from lockstep_hls.toolchain import find_compiler, run_command
from lockstep_rtl.generate import component_verilog, lane_module, simulated_verilog
from lockstep_rtl.vector.lane import Lane
from lockstep_sim.lanes import OWN, with_lanes_in_loops
from lockstep_sim.loops import PREFIX, Loops
from lockstep_sim.netlist import read_netlist
from lockstep_sim.verilate import VERILATOR_FLAGS, find_verilator
from rtl.harness import BUILD

#: What the lane of a core does not have: memory addresses of a lane's own, registers that feed each other in a ring,
#: a register that all copies share, products and shifts of more than 32 bits, signs, reset values.
ODD = """
module odd(clk, rst, go, step, key, a, b, sum, product, moved, wide, less, flags, chosen, ring, found);
  input clk, rst, go, step;
  input [3:0] key;
  input [39:0] a;
  input signed [19:0] b;
  output [31:0] sum, ring, found;
  output [39:0] product, moved;
  output [63:0] wide;
  output [3:0] less, flags;
  output [6:0] chosen;
  reg [31:0] sum = 32'd7, ring, x, y, z;
  reg [39:0] product, moved;
  reg [63:0] wide;
  reg [3:0] less, flags, count = 4'd5;
  reg [6:0] chosen;
  reg [31:0] found;
  reg [31:0] words [0:15];
  reg [35:0] common [0:15];
  wire signed [39:0] s = a;
  always @(posedge clk) if (rst) sum <= 32'd7; else if (go) sum <= sum - {a[3:0], b[19:1], count};
  always @(posedge clk) if (go) product <= b * $signed(a[19:0]) - s;
  always @(posedge clk) if (step) wide <= (a << key) + ({a, b} >> b[5:0]) + (~a ^ {24{b[0]}});
  always @(posedge clk) if (go) moved <= key[3] ? b << key : b >> key;
  always @(posedge clk) if (step) less <= {s < b, s <= $signed(b[9:0]), b > $signed(a[30:0]), a[31:0] >= {b[11:0], b}};
  always @(posedge clk) if (go) flags <= {|{a[33:32], a[1:0]}, &a[34:31], !b[2:0], a[33:30] == b[5:2]};
  always @(posedge clk)
    if (step)
      case (a[2:0])
        0: chosen <= a[9:3];
        1: chosen <= b[6:0];
        2, 3: chosen <= -b[8:2];
        default: chosen <= {7{b[3]}};
      endcase
  always @(posedge clk) if (rst) count <= 4'd5; else if (step & go) count <= count + key;
  // Each of these feeds the next; steps of one enable each.
  always @(posedge clk) if (go) x <= z + a[31:0];
  always @(posedge clk) if (step) y <= x ^ count;
  always @(posedge clk) if (key[0]) z <= y - words[a[3:0]];
  always @(posedge clk) if (key[1]) words[key] <= x;
  always @(posedge clk) if (key[2]) common[key] <= {count, key, 28'h1234567};
  always @(posedge clk) if (step) found <= common[b[3:0]][35:4];
  always @(posedge clk) ring <= z;
endmodule
"""


#: Runs the clock until the design ends by itself; the design says whether it went well.
MAIN = """
#include "Vtop.h"
int main() {
    VerilatedContext context;
    context.randSeed(1);
    Vtop top{&context};
    for (top.rst = 1; !context.gotFinish(); top.clk = !top.clk) top.eval();
    return !top.fine;
}
"""
#: A float as lanes meet them: an ordinary one, a special one, an integer, or any bits.
WORD = """
  function automatic [31:0] word(input [31:0] any, input [31:0] kind);
    case (kind[3:0])
      0: word = {any[31], 31'd0};
      1: word = {any[31], 31'h007fffff};
      2: word = {any[31], 31'h7f800000};
      3: word = {any[31], 31'h7fc00000 | any[30:0]};
      4: word = {24'd0, any[7:0]};
      5, 6: word = any;
      7: word = 32'h3f800000;
      default: word = {any[31], 8'd110 + {3'd0, kind[8:4]}, any[22:0]};
    endcase
  endfunction
"""


def side_by_side(
    module: str,
    loops: Loops,
    own: tuple[str, ...],
    lanes: int,
    cycles: int,
    held: tuple[str, ...] = (),
    sparse: tuple[str, ...] = (),
) -> str:
    """A top module with ``lanes`` copies of ``module`` beside its loops, and random inputs for both.

    held : inputs that change every 60 cycles. sparse : of some of these times all bits are set, of some few. The design
    ends after so many cycles, or at the first difference; ``fine`` says that there was none, and that each output has
    changed in one cycle of 200 or more often.
    """
    inputs, outputs = loops.netlist.inputs, loops.netlist.outputs
    copies = {port: lanes if port in own or port in outputs else 1 for port in (*inputs, *outputs)}
    widths = {port: len(bits) * copies[port] for port, bits in {**inputs, **outputs}.items()}
    driven = [port for port in inputs if port not in ("clk", "rst")]
    lines = ["module top(input clk, input rst, output reg fine);", WORD, "  reg [31:0] cycle = 0;", "  reg reset = 1;"]
    lines += [f"  reg [{widths[port] - 1}:0] in_{port} = 0;" for port in driven]
    for port in outputs:
        lines.append(f"  wire [{widths[port] - 1}:0] one_{port}, all_{port};")
        lines.append(f"  reg [{widths[port] - 1}:0] last_{port} = 0;")
        lines.append(f"  reg [31:0] changes_{port} = 0;")
    nets = {port: f"in_{port}" for port in driven} | {"clk": "clk", "rst": "reset"}
    for n in range(lanes):
        parts = []
        for port in (*inputs, *outputs):
            bits = widths[port] // copies[port]
            part = f"[{bits * n} +: {bits}]" if copies[port] > 1 else ""
            parts.append(f"    .\\{port} ({nets.get(port, f'one_{port}')}{part})")
        lines += [f"  {module} copy{n} (", ",\n".join(parts), "  );"]
    ports = [f".{PREFIX}{port}({nets.get(port, f'all_{port}')})" for port in (*inputs, *outputs)]
    lines += [f"  {loops.name} #(.LANES({lanes})) loops ({', '.join(ports)});", "  always @(negedge clk) begin"]
    for port in outputs:
        lines += [
            f"    if (one_{port} != all_{port}) begin",
            f'      $display("cycle %0d: {port} is %x one by one, %x in loops", cycle, one_{port}, all_{port});',
            "      fine <= 0;",
            "      $finish;",
            "    end",
            f"    changes_{port} <= changes_{port} + {{31'd0, one_{port} != last_{port}}};",
            f"    last_{port} <= one_{port};",
        ]
    lines += ["    cycle <= cycle + 1;", "    reset <= cycle < 2 || $urandom % 1000 == 0;"]
    for port in driven:
        width = widths[port]
        if width % 32 == 0:
            change = "".join(f"in_{port}[{low} +: 32] <= word($urandom, $urandom); " for low in range(0, width, 32))
        else:
            words = ", ".join(["$urandom"] * (width // 32 + 1))
            change = f"in_{port} <= {{{words}}};"
            if port in sparse:
                some = f"{{{words}}} & ({{{words}}} | {{{width}{{cycle / 60 % 3 == 1}}}})"
                change = f"in_{port} <= cycle / 60 % 3 == 0 ? '1 : {some};"
        lines.append(f"    {'if (cycle % 60 == 0) ' if port in held else ''}begin {change} end")
    lines += [f"    if (cycle == {cycles}) begin", "      fine <= 1;"]
    for port in outputs:
        lines += [
            f"      if (changes_{port} < {cycles // 200}) begin",
            f'        $display("{port} changed %0d times: nothing was compared", changes_{port});',
            "        fine <= 0;",
            "      end",
        ]
    return "\n".join([*lines, "      $finish;", "    end", "  end", "endmodule\n"])


def run(text: str, name: str) -> None:
    """Simulate the module ``top`` of ``text``; fails with what it says."""
    verilator, compiler = find_verilator(), find_compiler()
    folder = BUILD.parent / "lanes" / name
    program, source = folder / "top", folder / "top.v"
    if not program.exists() or source.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "main.cpp").write_text(MAIN)
        source.write_text(text)
        command = [verilator.executable, "--cc", "--top-module", "top", *VERILATOR_FLAGS, "--Mdir", folder, source]
        subprocess.run(command, env=verilator.environment, check=True, capture_output=True)
        include = verilator.root / "include"
        sources = [*folder.glob("*.cpp"), include / "verilated.cpp", include / "verilated_threads.cpp"]
        flags = ["-std=gnu++17", "-O0", "-w", f"-I{folder}", f"-I{include}", f"-I{include / 'vltstd'}"]
        flags += ["-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TIMING=0", "-DVM_TRACE=0", "-pthread"]
        run_command([*compiler, *flags, *sources, "-o", program])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("subwords", "lanes"), [(1, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_lanes_in_loops_say_what_lanes_say(subwords: int, lanes: int) -> None:
    module = lane_module(subwords)
    text = component_verilog(Lane(subwords), module)
    netlist = read_netlist(text, module)
    loops = Loops(netlist, f"{module}_loops", set(netlist.inputs) - set(OWN))
    top = side_by_side(module, loops, OWN, lanes, 20000, held=("mode",), sparse=("valid",))
    run(top + text + loops.verilog(), f"{module}_{lanes}")


def test_whatever_a_module_does_its_copies_in_loops_do() -> None:
    loops = Loops(read_netlist(ODD, "odd"), "odd_loops", {"clk", "rst", "go", "step", "key"})
    text = loops.verilog()
    assert re.search(r"\w+\[\w+\] = \w+_later\[i\];", text), "the ring is broken nowhere"
    run(side_by_side("odd", loops, ("a", "b"), 3, 20000) + ODD + text, "odd")


def test_instances_of_lanes_with_one_control_become_one_module() -> None:
    module = lane_module(1)
    lanes = component_verilog(Lane(1), module)
    netlist = read_netlist(lanes, module)
    ports = []
    for n in range(4):
        nets = {port: f"{port}_of_{n // 2}" for port in netlist.inputs}
        nets |= {port: f"{port}[{32 * n + 31}:{32 * n}]" for port in OWN}
        nets |= {"hidden": f"hidden{n}", "clk": "clk", "rst": "rst"}
        nets |= {port: f"{port}_{n}" for port in netlist.outputs}
        name = f"\\lane{n}$7 " if n == 1 else f"lane{n}"
        connections = ",\n".join(f"    .\\{port} ({net})" for port, net in nets.items())
        ports.append(f"  {module} {name} (\n{connections}\n  );\n")
    body = f"  before b (.clk(clk));\n{''.join(ports)}  wire after;\n"
    text = with_lanes_in_loops(f"module top(clk);\n{body}endmodule\n{lanes}")
    assert not re.search(rf"^(module|  ){module}\b", text, re.MULTILINE), "lanes are still there one by one"
    assert "before b" in text
    assert "wire after" in text
    first, second = re.findall(rf"  {module}_loops #\(\.LANES\(2\)\) lanes\d \((.*?)\n  \);", text, re.DOTALL)
    for connection in (".p_x(x[63:0])", ".p_hidden({ hidden1, hidden0 })", ".p_valid(valid_of_0)"):
        assert connection in first
    for connection in (".p_x(x[127:64])", ".p_result({ result_3, result_2 })", ".p_time(time_of_1)"):
        assert connection in second


def test_lanes_of_a_core_are_one_module_for_each_column_of_a_beat() -> None:
    verilog = simulated_verilog(SHAPES["wide"])
    assert verilog.count("\n  lockstep_lane_1 ") == 8
    text = with_lanes_in_loops(verilog)
    assert text.count("\n  lockstep_lane_1_loops #(.LANES(4)) lanes") == 2
    assert "lockstep_lane_1 " not in text


def test_instances_that_cannot_be_read_are_refused() -> None:
    module = lane_module(1)
    lanes = component_verilog(Lane(1), module)
    with pytest.raises(ValueError, match="not every instance"):
        with_lanes_in_loops(f"module top(clk);\n  {module} other (.clk(clk));\nendmodule\n{lanes}")


def test_text_without_lanes_stays() -> None:
    assert with_lanes_in_loops("module top(clk);\nendmodule\n") == "module top(clk);\nendmodule\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("always @(posedge a) q <= a;", "another clock"),
        ("always @(posedge clk) if (a) q <= b;", "enable of its own"),
        ("always @(posedge clk) begin q <= words[b]; if (b) words[a] <= b; end", "address of its own"),
        ("assign q = words[b]; always @(posedge clk) if (b) words[b] <= a;", "reads the memory"),
    ],
    ids=["clock", "enable", "address", "output"],
)
def test_what_has_no_loops_is_refused(line: str, message: str) -> None:
    kind = "wire" if "assign" in line else "reg"
    text = (
        f"module m(clk, rst, a, b, q);\ninput clk, rst, a, b; output q; {kind} q; reg words [0:1];\n{line}\nendmodule\n"
    )
    with pytest.raises(ValueError, match=message):
        Loops(read_netlist(text, "m"), "loops", {"clk", "rst", "b"}).verilog()
