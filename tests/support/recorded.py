"""Whether tests of something else decode with recorded passes: `make test-slow` has them do so.

To record the passes of a model takes as long as a hundred of them, and most tests make fewer.
"""

import os

RECORDED = os.environ.get("LVSPEC_TEST_RECORDED") == "1"
