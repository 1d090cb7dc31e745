"""The commands of `meddanet`, a module each, whose `run(options)` returns the exit code.

A command's module is imported when the arguments are read: help and usage errors come at once.
"""
