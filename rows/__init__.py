"""Rows: read, checked, encoded, kept, put into batches."""
