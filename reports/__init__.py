"""What people look at: pages, plots, tables."""
