"""The commands and the configuration.

Data in: flags, a YAML file, `FORESIGHT_…` environment variables; nothing else reads the
environment. Data out: one frozen `engine.config.Config`. Each command imports what it needs when it
runs, so that `foresight version` is quick and `foresight serve` starts its engine before anything.
"""
