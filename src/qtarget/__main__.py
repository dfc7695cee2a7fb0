"""``python -m qtarget``, the same as the ``qtarget`` command."""

import sys

from qtarget.cli.__main__ import main

sys.exit(main())
