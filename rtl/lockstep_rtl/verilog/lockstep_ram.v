// A memory with one write port of GRANULES enables and one read port, both on the same clock: what every FPGA calls
// simple dual-port block RAM. What a read gives in the cycle of a write to the same word is undefined on silicon, and
// nothing may rely on it: whatever could race is ordered by tokens. no_rw_check says so to the synthesis, which would
// otherwise compare addresses and set data aside to give the old word. Written here and not in Amaranth because
// Amaranth gives each word an initial value, which takes minutes for a megabyte.
module lockstep_ram #(
    parameter WIDTH = 32,
    parameter GRANULES = 1,
    parameter DEPTH = 16,
    parameter ADDRESS_BITS = 4
) (
    input wire clk,
    input wire [GRANULES-1:0] write_enable,
    input wire [ADDRESS_BITS-1:0] write_address,
    input wire [WIDTH-1:0] write_data,
    input wire read_enable,
    input wire [ADDRESS_BITS-1:0] read_address,
    output reg [WIDTH-1:0] read_data
);
    localparam PART = WIDTH / GRANULES;
    (* no_rw_check *)
    reg [WIDTH-1:0] words [0:DEPTH-1];
    integer part;

    always @(posedge clk)
        for (part = 0; part < GRANULES; part = part + 1)
            if (write_enable[part])
                words[write_address][part*PART +: PART] <= write_data[part*PART +: PART];

    always @(posedge clk)
        if (read_enable)
            read_data <= words[read_address];
endmodule
