#!/usr/bin/env python3
from megatron_ledom.cli.main import run_tool

if __name__ == "__main__":
    run_tool("infill")
