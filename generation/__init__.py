"""Answers: decoded, written down, given in a conversation."""
