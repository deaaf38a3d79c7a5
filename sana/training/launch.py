"""torchrun that ends as its processes do when it is asked to stop: with 128 + the signal's number, and no traceback.

    python -m sana.training.launch [arguments of torchrun] SCRIPT [its arguments]

So a scheduler can tell a run that was stopped, and is to be started again, from one that failed.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
