"""`python -m tersor` is the command-line tool."""

from tersor.cli import main

main()
