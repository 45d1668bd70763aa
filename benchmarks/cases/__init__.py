"""What is measured: the workloads, the variants of each, and the check that a variant passes before it is timed."""
