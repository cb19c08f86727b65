"""Set before torch is imported, here and in every process that a test starts."""

import os

# the tests' tensors are small: a second thread costs more than it brings, and two busy processes with two each crawl
os.environ.setdefault("OMP_NUM_THREADS", "1")
