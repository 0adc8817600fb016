"""Who runs where, how many, restarted how. The only place that creates Ray actors."""
