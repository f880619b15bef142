"""Run a script that sends SIGKILL to itself when it has renamed this many files whose name contains a text.

    python tests/interrupted.py TEXT COUNT SCRIPT [ARGUMENT ...]
"""

import os
import runpy
import signal
import sys

text, remaining, *sys.argv = sys.argv[1:]
remaining, replace = int(remaining), os.replace


def counting(source, target):
    global remaining
    replace(source, target)
    remaining -= text in os.path.basename(target)
    if not remaining:
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = counting
runpy.run_path(sys.argv[0], run_name="__main__")
