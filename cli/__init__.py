"""The command line: parse, call one library function, print. Installed as ``svdbank_cli``."""
