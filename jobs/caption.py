"""Bulk captioning as a Ray job: `ray job submit --working-dir . -- python jobs/caption.py SOURCE OUTPUT [options]`.

The options are those of `raycap caption`; the job joins the cluster that it was submitted to.
"""

import sys

from raycap.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])
