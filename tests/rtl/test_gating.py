"""Logic behind enables: what moves, what stays, and that nothing else of the text changes."""

from lockstep_rtl.gating import gate

MODULE = r"""module \top.unit (clk, rst, enable, other, a, b,
z, q, r);
  input clk;
  wire clk;
  output z;
  wire z;
  output [7:0] q;
  reg [7:0] q = 8'h00;
  output [7:0] r;
  reg [7:0] r = 8'h00;
  wire [7:0] \$1 ;
  wire [7:0] \$2 ;
  wire [7:0] \$3 ;
  wire [7:0] shared;
  wire [7:0] \$dead ;
  assign \$2  = \$1  + 8'h01;
  assign \$1  = a & b;
  assign \$3  = a ^ shared;
  assign shared = a | b;
  assign \$dead  = \$2 ;
  assign z = \$3 [0];
  always @(posedge clk)
    if (rst) q <= 8'h00;
    else if (enable) q <= \$2 ;
  always @(posedge clk)
    if (other) r <= shared;
  always @(posedge clk)
    w <= a;
  \inner  inner (
    .clk(clk)
  );
endmodule
"""


def block(text: str, enable: str) -> str:
    """The clocked block of one enable."""
    start = text.index(f"if ({enable}) begin")
    return text[start : text.index("\n  end", start)]


def test_nets_of_one_block_are_computed_in_it_innermost_first() -> None:
    text = gate(MODULE)
    inside = block(text, "enable")
    assert inside.index(r"\$1  = a & b;") < inside.index(r"\$2  = \$1  + 8'h01;") < inside.index(r"q <= \$2 ;")
    assert r"  reg [7:0] \$1 ;" in text
    assert r"  reg [7:0] \$2 ;" in text
    assert inside.index("if (rst) begin") > inside.index(r"q <= \$2 ;")
    assert "q <= 8'h00;" in inside


def test_nets_that_others_read_stay() -> None:
    text = gate(MODULE)
    assert "  assign shared = a | b;" in text
    assert r"  assign \$3  = a ^ shared;" in text
    assert r"  assign z = \$3 [0];" in text
    assert "  wire [7:0] shared;" in text
    assert block(text, "other").count("=") == 1


def test_nets_that_nothing_reads_go() -> None:
    assert "dead" not in gate(MODULE)


def test_everything_else_stays_as_it_is() -> None:
    text = gate("// a comment\n" + MODULE + "module other(clk);\n  input clk;\nendmodule\n")
    assert text.startswith("// a comment\nmodule \\top.unit (clk, rst, enable, other, a, b,\nz, q, r);\n")
    assert "  always @(posedge clk)\n    w <= a;\n  \\inner  inner (\n    .clk(clk)\n  );\n" in text
    assert text.endswith("module other(clk);\n  input clk;\nendmodule\n")


def test_a_net_in_an_enable_stays() -> None:
    text = gate(MODULE.replace("if (other) r <= shared;", r"if (\$1 [0]) r <= shared;"))
    assert r"  assign \$1  = a & b;" in text
