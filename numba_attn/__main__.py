"""`python -m numba_attn`: see `numba_attn.cli`."""

import sys

from numba_attn.cli import main

sys.exit(main())
