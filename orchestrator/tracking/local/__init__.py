"""The tracker without a cluster: one process per data directory, started on demand, shared by all local runs."""
