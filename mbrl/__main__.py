"""`python -m mbrl`: the console script."""

from mbrl.cli import main

main()
