"""Running written programs and their tests, apart from this process and from the machine."""
