"""The machine: what every run needs and no paper mentions. Trusted and imported; the scripts beside it are the lesson.

Import this package first: it sets what has to be set before torch is imported, and does nothing else.
"""

import os

# Idle threads of torch that spin would take the cores from the loading workers: on two cores the demo then runs at less
# than half its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
