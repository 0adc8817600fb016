"""Trains one run on the cluster: `ray job submit --working-dir . -- python -m jobs.train experiment=digits`."""

import sys

from orchestrator.launch import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
