"""`python -m runtime.cli`: the command without its script."""

from runtime.cli.main import main

main()
