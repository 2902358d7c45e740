"""Training as a Ray job: `ray job submit --working-dir . -- python jobs/train.py --annotations A.json ...`.

The options are those of `raycap train`; the job joins the cluster that it was submitted to.
"""

import sys

from raycap.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
