"""Evaluation as a Ray job: `ray job submit --working-dir . -- python jobs/evaluate.py --annotations A.json ...`.

The options are those of `raycap evaluate`; it runs in one process, on the node that the job was sent to.
"""

import sys

from raycap.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
