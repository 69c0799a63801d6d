"""python -m encoder.retouch --help"""

import sys

from encoder.retouch.drawings import main

if __name__ == "__main__":
    sys.exit(main())
