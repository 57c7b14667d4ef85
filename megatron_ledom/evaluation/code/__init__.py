"""Run model-written programs and their tests, isolated from this process and from the machine."""
