"""Tests in the processes of pytest-xdist are to see signals as those in pytest's own do."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # it ignores Ctrl-C there, and what a test starts would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
