"""Every process of the tests computes with one thread, and so does what it starts, unless it is told otherwise.

Products of tiny models are slower on several threads, by far where other processes use the cores, too: 1290 tests of
experts took 21 s on two cores that took 271 with two threads each (two pytest processes).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
