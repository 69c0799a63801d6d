"""python -m encoder.live --help"""

import sys

from encoder.live.command import main

if __name__ == "__main__":
    sys.exit(main())
