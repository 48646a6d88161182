"""Folders of weights and states: saved, opened, looked into."""
