"""`python -m turboserve` is the command line."""

from turboserve.cli.main import main

main(prog_name="turboserve")
