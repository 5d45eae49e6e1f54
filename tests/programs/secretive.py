"""secretive.py: serves the socket it inherits as http_one.py does, but lets nobody of its user look into it.

PR_SET_DUMPABLE 0 (prctl(2)) is what ssh-agent and the like do. The descriptors of such a process are out of reach for
all but root.
"""

import ctypes
import os
import runpy

PR_SET_DUMPABLE = 4

ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
runpy.run_path(os.path.join(os.path.dirname(__file__), "http_one.py"), run_name="__main__")
