"""Which kind of memory each thing should be, and when the slow layer is rewritten: pure functions of measured costs."""
