"""The page for the camera and its server. `python -m encoder.live --help`"""

from pathlib import Path

PAGE = Path(__file__).parent / "page"
