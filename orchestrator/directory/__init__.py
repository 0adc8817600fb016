"""The run's directory: what a person finds there with no service running, and how a run travels as one bundle."""
