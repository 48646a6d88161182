"""The flags of each command, with their checks."""
