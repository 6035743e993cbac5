"""``python -m svdbank``: the command line of the Python that runs it. The one file of the library that knows of the command line."""

from svdbank_cli.main import main

if __name__ == "__main__":
    main()
