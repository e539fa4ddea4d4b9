"""On PYTHONPATH of a client under test: its pauses between attempts are a hundred times shorter."""

import time


sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)
