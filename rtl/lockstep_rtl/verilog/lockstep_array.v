// The elements of the systolic array with the registers that skew its operands; array.py says what it does and when.
//
// Written here and not in Amaranth for the simulator: elements are arrays, steps are loops over them, and what Verilator
// makes of that is compiled to vector instructions, where element by element it would be a page of code for each. For
// the same reason operands are kept in whole words there. Elements are updated in place, each before what it reads is:
// no assignment waits, and nothing outside sees the arrays.
module lockstep_array #(
    parameter ROWS = 4,
    parameter COLUMNS = 4
) (
    input wire clk,
    input wire [9*ROWS-1:0] a,
    input wire [8*COLUMNS-1:0] w,
    input wire first,
    input wire last,
    output reg [32*ROWS-1:0] result,
    output reg strobe
);
`ifdef VERILATOR
    localparam A_BITS = 32, W_BITS = 32;
    reg [31:0] keep;
`else
    localparam A_BITS = 9, W_BITS = 8;
    // Signed as the products that are added to it: one operand without a sign would take theirs from all others.
    reg signed [31:0] keep;
`endif
    // Register d of row r, or of column c, in front of the elements; the upper triangle is not used.
    (* mem2reg *) reg signed [A_BITS-1:0] a_waits [0:ROWS-1][0:ROWS-1];
    (* mem2reg *) reg signed [W_BITS-1:0] w_waits [0:COLUMNS-1][0:COLUMNS-1];
    // Element (r, c).
    (* mem2reg *) reg signed [A_BITS-1:0] a_here [0:ROWS-1][0:COLUMNS-1];
    (* mem2reg *) reg signed [W_BITS-1:0] w_here [0:ROWS-1][0:COLUMNS-1];
    (* mem2reg *) reg signed [31:0] sums [0:ROWS-1][0:COLUMNS-1];
    // Diagonal d = r + c.
    (* mem2reg *) reg firsts [0:ROWS+COLUMNS-1];
    (* mem2reg *) reg lasts [0:ROWS+COLUMNS-1];
    reg [31:0] r, c, d, column;
    reg some;

    always @(posedge clk) begin
        // Written first, so that they are variables of the block and not state of the module.
        r = 0;
        c = 0;
        d = 0;
        column = 0;
        some = 0;
        keep = 0;

        // The sums that are complete: one column of each row.
        /* verilator unroll_disable */
        for (r = 0; r < ROWS; r = r + 1) begin
            column = 0;
            /* verilator unroll_disable */
            for (c = 0; c < COLUMNS; c = c + 1)
                column = column | (sums[r][c] & {32{lasts[r + c + 1]}});
            result[32*r +: 32] <= column;
        end
        /* verilator unroll_disable */
        for (d = 1; d <= COLUMNS; d = d + 1)
            some = some | lasts[d];
        strobe <= some;

        // Multiply and add.
        /* verilator unroll_disable */
        for (r = 0; r < ROWS; r = r + 1) begin
            /* verilator unroll_disable */
            for (c = 0; c < COLUMNS; c = c + 1) begin
                keep = ~{32{firsts[r + c]}};
                sums[r][c] = (sums[r][c] & keep) + a_here[r][c] * w_here[r][c];
            end
        end

        // Operands go one element on: those of rows to the right, those of columns down.
        /* verilator unroll_disable */
        for (r = 0; r < ROWS; r = r + 1) begin
            /* verilator unroll_disable */
            for (c = COLUMNS - 1; c > 0; c = c - 1)
                a_here[r][c] = a_here[r][c - 1];
        end
        /* verilator unroll_disable */
        for (r = ROWS - 1; r > 0; r = r - 1) begin
            /* verilator unroll_disable */
            for (c = 0; c < COLUMNS; c = c + 1)
                w_here[r][c] = w_here[r - 1][c];
        end

        // Into the first elements, out of the last register of each row and column.
        a_here[0][0] = $signed(a[0 +: 9]);
        /* verilator unroll_disable */
        for (r = 1; r < ROWS; r = r + 1) begin
            a_here[r][0] = a_waits[r][r - 1];
            /* verilator unroll_disable */
            for (d = r - 1; d > 0; d = d - 1)
                a_waits[r][d] = a_waits[r][d - 1];
            a_waits[r][0] = $signed(a[9*r +: 9]);
        end
        w_here[0][0] = $signed(w[0 +: 8]);
        /* verilator unroll_disable */
        for (c = 1; c < COLUMNS; c = c + 1) begin
            w_here[0][c] = w_waits[c][c - 1];
            /* verilator unroll_disable */
            for (d = c - 1; d > 0; d = d - 1)
                w_waits[c][d] = w_waits[c][d - 1];
            w_waits[c][0] = $signed(w[8*c +: 8]);
        end

        /* verilator unroll_disable */
        for (d = ROWS + COLUMNS - 1; d > 0; d = d - 1) begin
            firsts[d] = firsts[d - 1];
            lasts[d] = lasts[d - 1];
        end
        firsts[0] = first;
        lasts[0] = last;
    end
endmodule
