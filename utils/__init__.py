"""Settings, errors, files, device, processes and costs; data and runs are subpackages."""

import os
import sys

# Pictures are drawn without any window.  A notebook names a backend to the commands that it starts, too, and matplotlib
# ends their import where that is not installed beside it.
if "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)
