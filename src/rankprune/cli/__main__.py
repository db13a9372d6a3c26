"""`python -m rankprune.cli`."""

from rankprune.cli import main

main()
