"""The command line `orc`: `main.py` dispatches, `parser.py` lists every verb, the other modules hold the verbs."""
