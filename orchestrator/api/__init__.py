"""The read-only HTTP server of a stack: `orc ls`, `show`, `metrics` and `logs` ask it, here and from other hosts."""
