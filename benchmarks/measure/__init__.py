"""How it is measured: interleaved timing, the allocator, facts of the machine, the results file."""
