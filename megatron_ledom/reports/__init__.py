"""Every page, table and plot."""
