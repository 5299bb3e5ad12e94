"""``python -m loraport``."""

from loraport.cli import main

main()
