"""The ground: how commands begin and end, processes, this machine."""
