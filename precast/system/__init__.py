"""The machine: CPU, memory, NUMA, processes, shared memory, and the embedded Redis."""
