"""Reports: pages, tables and plots."""
