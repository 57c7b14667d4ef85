"""The process of the models uses freed memory again instead of asking the system for it."""

import subprocess
import sys

from tests.support.paths import ROOT

CODE = """
import resource
from megatron_ledom.inference.freed_memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
before = new_pages()
keep_freed_memory()
new_pages()
print(before, new_pages())
"""


def test_freed_memory_is_used_again_without_page_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    assert after < 10
    assert before > 30  # huge pages have 2 MiB, others 4 KiB; 0 where the libc keeps memory anyway
