"""Methods compared over the same rows."""
