"""Control: command ring, instruction fetch, dispatch, tokens, registers, counters and the error stop."""
