"""How good answers are: tasks, metrics, intervals, what was forgotten."""
