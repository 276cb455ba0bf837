"""A worker process around the test double; run as a script with the worker's own arguments."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import TinyModel

from turboserve.runtime.worker import main


class SlowModel(TinyModel):
    """Takes a while per pass, so that a test can catch it in mid-chunk."""

    def forward(self, batch):
        time.sleep(0.002)
        return super().forward(batch)


if __name__ == "__main__":
    main(load_model=lambda config: SlowModel())
