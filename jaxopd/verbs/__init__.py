"""The verbs of the command line: one dataclass each, its fields the flags, `run` the work."""
