"""A model as judge."""
