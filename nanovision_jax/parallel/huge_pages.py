"""Huge pages for large buffers, on Linux."""

import os
import sys


def use():
    """Has glibc ask for huge pages, by starting the command once more: it reads this as a process begins.

    On a CPU, XLA's buffers come and go with every step, and with small pages a third of a step is their page faults.
    What GLIBC_TUNABLES says already stays; under another C library it says nothing.
    """
    if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
        os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
        os.execv(sys.executable, sys.orig_argv)
