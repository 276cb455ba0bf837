"""A worker process around the test double; run as a script with the worker's own arguments."""

import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import TinyModel

from turboserve.runtime.worker import main


class SlowModel(TinyModel):
    """Takes a while per pass, so that a test can catch it in mid-chunk."""

    def forward(self, batch):
        time.sleep(0.002)
        return super().forward(batch)

    def decode(self, state, chunk_index):
        return np.repeat(super().decode(state, chunk_index), int(os.environ.get("TINY_FRAMES_REPEAT", "1")), axis=0)


if __name__ == "__main__":
    main(load_model=lambda config: SlowModel())
