"""Runs one sweep on the cluster: `ray job submit --working-dir . -- python -m jobs.sweep experiment=digits …`."""

import sys

from orchestrator.launch import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
