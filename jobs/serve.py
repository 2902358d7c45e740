"""The endpoint as a Ray job: `ray job submit --working-dir . -- python jobs/serve.py [options]`.

The options are those of `raycap serve`; the job joins the cluster that it was submitted to, and answers until it is
stopped. `ray job stop` kills it after 3 s; the endpoint then answers what it has, and ends by itself once
`--drain-s` and `--deadline-s` are over. What is killed outright leaves it behind: `serve shutdown` ends it.
"""

import sys

from raycap.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
