"""The benchmark as a Ray job: `ray job submit --working-dir . -- python jobs/benchmark.py SOURCE [options]`.

The options are those of `raycap benchmark`; the job joins the cluster that it was submitted to.
"""

import sys

from raycap.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
