"""The writer of checkpoints as a process of its own, and how a trainer reaches one."""
