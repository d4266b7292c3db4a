"""`python -m modernbert_align`: the same as the `modernbert-align` command."""

import sys

from modernbert_align.cli import main

sys.exit(main())
