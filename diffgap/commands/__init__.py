"""The commands of :mod:`diffgap.cli`, a module each: what a command takes, and what it prints."""
