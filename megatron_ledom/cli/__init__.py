"""The command line: `ledom COMMAND`, one file a command. `tools/COMMAND.py` runs the same from a checkout.

Each file has `build_parser` and `main`, imports nothing heavy at its top, and ends in one call of the package.
"""
