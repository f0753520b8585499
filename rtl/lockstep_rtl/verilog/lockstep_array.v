// The elements of the systolic array with the registers that skew its operands; array.py says what it does and when.
//
// Written here and not in Amaranth for the simulator: elements are arrays, steps are loops over them, and what Verilator
// makes of that is compiled to vector instructions, where element by element it would be a page of code for each. For
// the same reason operands are kept in whole words there. Elements are updated in place, each before what it reads is:
// no assignment waits, and nothing outside sees the arrays.
//
// Where PACKED is 1, an element has a second multiplier with a weight of its own, and each of the two multiplies one of
// four left operands: a pick of 0 is that of `a`, picks of 1 to 3 are those of `a_more`. Of `picks`, the lower half is
// of the first weights. `w_more` and `picks` are 0 where `more` is not there: then an element does what it does without
// them, and a simulator, which counts how long they take through the array, need not look at them.
module lockstep_array #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter PACKED = 0
) (
    input wire clk,
    input wire [9*ROWS-1:0] a,
    input wire [8*COLUMNS-1:0] w,
    input wire first,
    input wire last,
    input wire more,
    input wire [27*ROWS-1:0] a_more,
    input wire [8*COLUMNS-1:0] w_more,
    input wire [4*COLUMNS-1:0] picks,
    output reg [32*ROWS-1:0] result,
    output reg strobe
);
`ifdef VERILATOR
    localparam A_BITS = 32, W_BITS = 32, PICK_BITS = 32;
    reg [31:0] keep;
`else
    localparam A_BITS = 9, W_BITS = 8, PICK_BITS = 2;
    // Signed as the products that are added to it: one operand without a sign would take theirs from all others.
    reg signed [31:0] keep;
`endif
    localparam MORE_ROWS = PACKED ? ROWS : 1, MORE_COLUMNS = PACKED ? COLUMNS : 1;
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
    // What a packed core has beside them: three more left operands, a second weight, and the picks of both.
    (* mem2reg *) reg signed [A_BITS-1:0] a1_waits [0:MORE_ROWS-1][0:MORE_ROWS-1];
    (* mem2reg *) reg signed [A_BITS-1:0] a2_waits [0:MORE_ROWS-1][0:MORE_ROWS-1];
    (* mem2reg *) reg signed [A_BITS-1:0] a3_waits [0:MORE_ROWS-1][0:MORE_ROWS-1];
    (* mem2reg *) reg signed [W_BITS-1:0] v_waits [0:MORE_COLUMNS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg [PICK_BITS-1:0] w_picks_wait [0:MORE_COLUMNS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg [PICK_BITS-1:0] v_picks_wait [0:MORE_COLUMNS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg signed [A_BITS-1:0] a1_here [0:MORE_ROWS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg signed [A_BITS-1:0] a2_here [0:MORE_ROWS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg signed [A_BITS-1:0] a3_here [0:MORE_ROWS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg signed [W_BITS-1:0] v_here [0:MORE_ROWS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg [PICK_BITS-1:0] w_picks [0:MORE_ROWS-1][0:MORE_COLUMNS-1];
    (* mem2reg *) reg [PICK_BITS-1:0] v_picks [0:MORE_ROWS-1][0:MORE_COLUMNS-1];
`ifdef VERILATOR
    // Steps until the last of them have left the array.
    reg [31:0] left = 0;
    wire here = PACKED != 0 && left != 0;
    wire moving = PACKED != 0 && (left != 0 || more);
    always @(posedge clk)
        left <= more ? ROWS + COLUMNS - 1 : left - {31'b0, left != 0};
`else
    localparam here = PACKED, moving = PACKED;
`endif
    reg [31:0] r, c, d, column;
    reg some;

    function signed [A_BITS-1:0] picked(
        input [PICK_BITS-1:0] pick,
        input signed [A_BITS-1:0] a0,
        input signed [A_BITS-1:0] a1,
        input signed [A_BITS-1:0] a2,
        input signed [A_BITS-1:0] a3
    );
        picked = pick[1] ? (pick[0] ? a3 : a2) : (pick[0] ? a1 : a0);
    endfunction

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
        if (here) begin
            /* verilator unroll_disable */
            for (r = 0; r < ROWS; r = r + 1) begin
                /* verilator unroll_disable */
                for (c = 0; c < COLUMNS; c = c + 1) begin
                    keep = ~{32{firsts[r + c]}};
                    sums[r][c] = (sums[r][c] & keep)
                        + picked(w_picks[r][c], a_here[r][c], a1_here[r][c], a2_here[r][c], a3_here[r][c]) * w_here[r][c]
                        + picked(v_picks[r][c], a_here[r][c], a1_here[r][c], a2_here[r][c], a3_here[r][c]) * v_here[r][c];
                end
            end
        end else begin
            /* verilator unroll_disable */
            for (r = 0; r < ROWS; r = r + 1) begin
                /* verilator unroll_disable */
                for (c = 0; c < COLUMNS; c = c + 1) begin
                    keep = ~{32{firsts[r + c]}};
                    sums[r][c] = (sums[r][c] & keep) + a_here[r][c] * w_here[r][c];
                end
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

        if (moving) begin
            /* verilator unroll_disable */
            for (r = 0; r < ROWS; r = r + 1) begin
                /* verilator unroll_disable */
                for (c = COLUMNS - 1; c > 0; c = c - 1) begin
                    a1_here[r][c] = a1_here[r][c - 1];
                    a2_here[r][c] = a2_here[r][c - 1];
                    a3_here[r][c] = a3_here[r][c - 1];
                end
            end
            /* verilator unroll_disable */
            for (r = ROWS - 1; r > 0; r = r - 1) begin
                /* verilator unroll_disable */
                for (c = 0; c < COLUMNS; c = c + 1) begin
                    v_here[r][c] = v_here[r - 1][c];
                    w_picks[r][c] = w_picks[r - 1][c];
                    v_picks[r][c] = v_picks[r - 1][c];
                end
            end
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
        if (moving) begin
            a1_here[0][0] = $signed(a_more[0 +: 9]);
            a2_here[0][0] = $signed(a_more[9*ROWS +: 9]);
            a3_here[0][0] = $signed(a_more[18*ROWS +: 9]);
            /* verilator unroll_disable */
            for (r = 1; r < ROWS; r = r + 1) begin
                a1_here[r][0] = a1_waits[r][r - 1];
                a2_here[r][0] = a2_waits[r][r - 1];
                a3_here[r][0] = a3_waits[r][r - 1];
                /* verilator unroll_disable */
                for (d = r - 1; d > 0; d = d - 1) begin
                    a1_waits[r][d] = a1_waits[r][d - 1];
                    a2_waits[r][d] = a2_waits[r][d - 1];
                    a3_waits[r][d] = a3_waits[r][d - 1];
                end
                a1_waits[r][0] = $signed(a_more[9*r +: 9]);
                a2_waits[r][0] = $signed(a_more[9*(ROWS + r) +: 9]);
                a3_waits[r][0] = $signed(a_more[9*(2*ROWS + r) +: 9]);
            end
            v_here[0][0] = $signed(w_more[0 +: 8]);
            w_picks[0][0] = picks[0 +: 2];
            v_picks[0][0] = picks[2*COLUMNS +: 2];
            /* verilator unroll_disable */
            for (c = 1; c < COLUMNS; c = c + 1) begin
                v_here[0][c] = v_waits[c][c - 1];
                w_picks[0][c] = w_picks_wait[c][c - 1];
                v_picks[0][c] = v_picks_wait[c][c - 1];
                /* verilator unroll_disable */
                for (d = c - 1; d > 0; d = d - 1) begin
                    v_waits[c][d] = v_waits[c][d - 1];
                    w_picks_wait[c][d] = w_picks_wait[c][d - 1];
                    v_picks_wait[c][d] = v_picks_wait[c][d - 1];
                end
                v_waits[c][0] = $signed(w_more[8*c +: 8]);
                w_picks_wait[c][0] = picks[2*c +: 2];
                v_picks_wait[c][0] = picks[2*(COLUMNS + c) +: 2];
            end
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
