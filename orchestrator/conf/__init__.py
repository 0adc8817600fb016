"""Our configuration groups, as yaml. A package, so that Hydra finds them as pkg://orchestrator.conf; see README.md."""
