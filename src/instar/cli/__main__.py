"""`python -m instar.cli`: the program, where its script is not on PATH."""

from instar.cli.main import main

main()
