"""The rules. Pure functions of values: no clock, no disk, no threads."""
