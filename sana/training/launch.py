"""torchrun that ends as its processes do: with their exit status, or 128 + the signal that stopped them, and no traceback.

    python -m sana.training.launch [arguments of torchrun] SCRIPT [its arguments]

So a scheduler can tell a run that was stopped, and is to be started again, from one that failed; and what the processes say
of a wrong config stays the last thing on the screen.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    # Of a process that fails it logs a summary of many lines, behind the process's own one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status >= 0 else 128 - status)
